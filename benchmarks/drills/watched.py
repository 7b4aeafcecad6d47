"""A rollout that prints its responses, so that a drill can compare runs and kill one within a step."""

from contextlib import AbstractContextManager

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Rollout, Student, Teacher, Trajectories


class WatchedRollout(Rollout):
    """Another rollout whose responses are printed as `RESPONSES [[ids], ...]`, one line per training batch.

    Args:
        rollout: the rollout that generates.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        return self.rollout.max_response_tokens(data, split)

    def active(self, student: Student) -> AbstractContextManager[None]:
        return self.rollout.active(student)

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Generate with the other rollout, and print the responses."""
        trajectories = self.rollout.generate(student, teacher, batch)
        if student.training:
            print("RESPONSES", [response.tolist() for response in trajectories.responses], flush=True)
        return trajectories
