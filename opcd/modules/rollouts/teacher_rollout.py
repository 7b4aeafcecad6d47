"""Responses of the teacher with the context: off-policy."""

from typing import ClassVar

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules.lm.generation import Sampling
from opcd.modules.rollouts.base import Rollout, Writer
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class TeacherRollout(Rollout):
    """Off-policy, as in plain context distillation: y ~ p_T(. | c, x), the teacher answers with the context.

    Args:
        sampling: how tokens are drawn.
    """

    writer: ClassVar[Writer] = "teacher"
    sampling: Sampling
    asks_teacher: ClassVar[bool] = True

    def __init__(self, sampling: Sampling = Sampling()) -> None:  # noqa: B008
        self.sampling = sampling

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        return self.sampling.max_new_tokens

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        responses = teacher.generate(batch, self.sampling, student.eos_ids, student.pad_id)
        return Trajectories.of(batch, responses, student.eos_ids)
