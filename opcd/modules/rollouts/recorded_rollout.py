"""Responses of the data."""

from typing import ClassVar, TypeVar

from opcd.data import Batch, ContextQueryDataModule, Example
from opcd.modules.rollouts.base import Rollout, Writer
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

Value = TypeVar("Value")


class RecordedRollout(Rollout):
    """Responses from the data: the `response` (or `completion`) of every example."""

    writer: ClassVar[Writer] = "data"

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """The longest response of the data (UserError if a row has none)."""
        return max(len(data.views.response_ids(_recorded(e, e.response))) for e in data.examples(split))

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        responses = [_recorded(e, response) for e, response in zip(batch.examples, batch.responses, strict=True)]
        return Trajectories.of(batch, responses, student.eos_ids)


def _recorded(example: Example, response: Value | None) -> Value:
    """The response of a row, which must have one."""
    if response is None:
        raise UserError(
            f"{example.source}: no `response`, but model.rollout is RecordedRollout; "
            "add one to every row, or let StudentRollout or TeacherRollout write it"
        )
    return response
