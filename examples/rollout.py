"""A rollout in one file: the teacher begins, the student goes on.

    opcd fit --config configs/quickstart.yaml \\
        --model.rollout '{class_path: examples.rollout.TeacherStart, init_args: {tokens: 4}}'
"""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import ClassVar

import torch

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Rollout, Sampling, Student, StudentRollout, Teacher, Trajectories


class TeacherStart(Rollout):
    """The teacher writes the first tokens with the context, the student the rest without: what the student would
    never begin by itself is learnt on-policy from there on. All tokens count in the loss.

    Args:
        tokens: how many the teacher writes, at least 1.
        sampling: how both draw; `max_new_tokens` are the student's.
    """

    asks_teacher: ClassVar[bool] = True

    def __init__(self, tokens: int = 4, sampling: Sampling = Sampling()) -> None:  # noqa: B008
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}: 0 is StudentRollout")
        self.start, self.rollout = Sampling(**{**vars(sampling), "max_new_tokens": tokens}), StudentRollout(sampling)

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """Both parts."""
        return self.start.max_new_tokens + self.rollout.max_response_tokens(data, split)

    def active(self, student: Student) -> AbstractContextManager[None]:
        """The student's part takes its weights, and frees them afterwards."""
        return self.rollout.active(student)

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Let the student continue every start that has not ended."""
        responses = teacher.generate(batch, self.start, student.eos_ids, student.pad_id)
        rows = [row for row, start in enumerate(responses) if int(start[-1]) not in student.eos_ids]
        if rows:
            pairs = zip(batch.select(rows).rows, rows, strict=True)
            begun = [replace(row, student_prompt=torch.cat([row.student_prompt, responses[n]])) for row, n in pairs]
            for row, rest in zip(
                rows, self.rollout.generate(student, teacher, Batch(begun, batch.views)).responses, strict=True
            ):
                responses[row] = torch.cat([responses[row], rest])
        return Trajectories.of(batch, responses, student.eos_ids)
