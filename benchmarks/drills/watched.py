"""A rollout that prints what it wrote, so that a drill can compare runs and strike within a step."""

from contextlib import AbstractContextManager

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Rollout, Student, Teacher, Trajectories


class WatchedRollout(Rollout):
    """Another rollout's responses, printed as `RESPONSES [[ids], ...]`, a line a batch of training.

    Args:
        rollout: who writes.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """As the other's."""
        return self.rollout.max_response_tokens(data, split)

    def active(self, student: Student) -> AbstractContextManager[None]:
        """As the other's."""
        return self.rollout.active(student)

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """As the other's, and printed."""
        trajectories = self.rollout.generate(student, teacher, batch)
        if student.training:
            print("RESPONSES", [response.tolist() for response in trajectories.responses], flush=True)
        return trajectories
