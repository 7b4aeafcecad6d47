"""A random mixture of rollouts."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch

from opcd.data import Batch, ContextQueryDataModule
from opcd.modules.rollouts.base import Rollout
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories


class MixedRollout(Rollout):
    """A mixture of rollouts, one drawn with given probabilities (the lambda of GKD, arXiv:2306.13649).

    Args:
        rollouts: at least two rollouts.
        shares: probability of each, in the same order; they sum to 1.
        draw: row: a rollout for each example. batch: one rollout for all examples of a batch, as in GKD; a step then
            needs the decode passes of one rollout only.
    """

    def __init__(self, rollouts: list[Rollout], shares: list[float], draw: Literal["row", "batch"] = "row") -> None:
        if len(rollouts) < 2 or len(rollouts) != len(shares):
            raise ValueError(f"MixedRollout needs two or more rollouts and a share for each, got {len(shares)} shares")
        if any(rollout.multi_turn for rollout in rollouts):
            raise ValueError("MixedRollout needs one response per row: put it inside the GameRollout, not around it")
        if any(rollout.importance_clip is not None for rollout in rollouts):
            raise ValueError("MixedRollout: a rollout's importance_clip has no effect inside it; leave it out")
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"shares must be positive and sum to 1, got {shares}")
        if draw not in ("row", "batch"):
            raise ValueError(f"MixedRollout: draw must be row or batch, got {draw!r}")
        self.rollouts, self.shares, self.draw = rollouts, shares, draw

    @property
    def parts(self) -> list[Rollout]:
        return [part for rollout in self.rollouts for part in rollout.parts]

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        return max(rollout.max_response_tokens(data, split) for rollout in self.rollouts)

    @contextmanager
    def active(self, student: Student) -> Iterator[None]:
        """Activate all rollouts, because any may be drawn."""
        with ExitStack() as active:
            for rollout in self.rollouts:
                active.enter_context(rollout.active(student))
            yield

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Draw a rollout for each row, or for the batch, and generate; the rows keep their order."""
        draws = len(batch) if self.draw == "row" else 1
        drawn = torch.multinomial(torch.tensor(self.shares), draws, replacement=True).tolist()
        drawn *= len(batch) // draws
        parts: list[Trajectories] = []
        order: list[int] = []
        for number, rollout in enumerate(self.rollouts):
            rows = [row for row, choice in enumerate(drawn) if choice == number]
            if rows:
                parts.append(rollout.generate(student, teacher, batch.select(rows)))
                order += rows
        return Trajectories.joined(parts).select([order.index(row) for row in range(len(batch))])
