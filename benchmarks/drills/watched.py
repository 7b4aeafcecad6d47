"""A rollout that prints what it wrote, so that a drill can compare runs and strike within a step."""

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Rollout, Student, Teacher, Trajectories


class WatchedRollout(Rollout):
    """Another rollout's responses, printed as `RESPONSES [[ids], ...]`, a line a batch of training.

    Args:
        rollout: who writes.
    """

    def __init__(self, rollout: Rollout) -> None:
        self.rollout = rollout

    def longest_response(self, data: ContextQueryDataModule, split: str) -> int:
        """As the other's."""
        return self.rollout.longest_response(data, split)

    def synchronise(self, student: Student) -> None:
        """As the other's."""
        self.rollout.synchronise(student)

    def sample(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """As the other's, and printed."""
        trajectories = self.rollout.sample(student, teacher, batch)
        if student.training:
            print("RESPONSES", [response.tolist() for response in trajectories.responses], flush=True)
        return trajectories
