"""Responses with the prompts of both views, their micro-batches, and their weights in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opcd.data import Batch
from opcd.data.batch import Prompts
from opcd.data.example import ANCHORS
from opcd.runtime.errors import UserError

Reduction = Literal["token", "sequence"]

PASS = 256
"""The estimated cost of one more pass, in tokens: each pass casts weights and adds up gradients."""


@dataclass
class Trajectory:
    """A response and its prompts.

    Attributes:
        student_prompt: [P] token ids: the query without the context.
        teacher_prompt: [Q] token ids: the query with the context.
        teacher_prefix: [P] token ids that all teacher prompts with this context begin with (`Views.teacher_prefix`).
        response: [R] token ids, R >= 1. It ends with its first end-of-sequence token or at the length limit, so every
            token of it counts.
        ended: whether it ends with an end-of-sequence token.
        log_probs: [R]: log p(y) in nats of each token under the policy that wrote it, at temperature 1; None if
            unknown.
        teacher: the name of the teacher that scores it; None if there is only one.
    """

    student_prompt: Tensor
    teacher_prompt: Tensor
    teacher_prefix: Tensor
    response: Tensor
    ended: bool = False
    log_probs: Tensor | None = None
    teacher: str | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens of the student's prompt and the response."""
        return len(self.student_prompt) + len(self.response)


@dataclass
class Trajectories(Prompts):
    """The responses of a step, or of one of its micro-batches.

    Attributes:
        rows: B trajectories.
    """

    rows: list[Trajectory]

    @classmethod
    def of(
        cls,
        batch: Batch,
        responses: list[Tensor],
        eos_ids: set[int],
        log_probs: Sequence[Tensor | None] | None = None,
    ) -> Trajectories:
        """Join a batch with one response per example; tokens after the first end-of-sequence token are cut.

        Responses and log-probabilities are moved to the prompts' device.

        Raises:
            UserError: a response has no token.
        """
        rows = []
        for row, response, scores in zip(batch.rows, responses, log_probs or [None] * len(responses), strict=True):
            if not len(response):
                raise UserError(f"{row.example.source}: the rollout wrote no token, not even an end-of-sequence token")
            device, cut = row.student_prompt.device, first_sequence(response, eos_ids)
            prompts = (row.student_prompt, row.teacher_prompt, row.teacher_prefix)
            known = None if scores is None else scores[: len(cut)].to(device)
            rows.append(Trajectory(*prompts, cut.to(device), int(cut[-1]) in eos_ids, known, row.example.teacher))
        return cls(rows)

    @classmethod
    def joined(cls, parts: list[Trajectories]) -> Trajectories:
        """The rows of all parts, one part after the other."""
        return cls([row for part in parts for row in part.rows])

    @property
    def responses(self) -> list[Tensor]:
        """The response of each row, [R]."""
        return [row.response for row in self.rows]

    @property
    def ended(self) -> list[bool]:
        """Whether each response ends with an end-of-sequence token."""
        return [row.ended for row in self.rows]

    @property
    def log_probs(self) -> list[Tensor | None]:
        """The log-probabilities of each response, [R]."""
        return [row.log_probs for row in self.rows]

    @property
    def teachers(self) -> list[str | None]:
        """The teacher of each row."""
        return [row.teacher for row in self.rows]

    @property
    def anchors(self) -> Tensor:
        """Whether each row is an anchor, which has no context, [B] bool."""
        return torch.tensor([row.teacher == ANCHORS for row in self.rows], dtype=torch.bool)

    @property
    def lengths(self) -> Tensor:
        """The number of tokens of each response, [B] int64."""
        return torch.tensor([len(response) for response in self.responses])

    @property
    def longest(self) -> int:
        """The number of tokens of the longest student row."""
        return max(row.tokens for row in self.rows)

    @property
    def empty(self) -> int:
        """How many responses consist of an end-of-sequence token only."""
        return sum(len(row.response) == 1 and row.ended for row in self.rows)

    def select(self, rows: list[int]) -> Trajectories:
        """The trajectories at `rows`, in that order."""
        return Trajectories([self.rows[row] for row in rows])

    def micro_batches(self, max_tokens: int) -> list[list[int]]:
        """The rows of each micro-batch: of similar length, for little padding, and at most `max_tokens` tokens.

        The size of a micro-batch is rows x longest student row; a single longer row is a micro-batch of its own.
        """
        return length_groups([row.tokens for row in self.rows], max_tokens)


def first_sequence(response: Tensor, eos_ids: set[int]) -> Tensor:
    """Cut a response after its first end-of-sequence token: [R] -> [<= R]."""
    for position, token in enumerate(response.tolist()):
        if token in eos_ids:
            return response[: position + 1]
    return response


def length_groups(sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Split the indices of `sizes` into groups of neighbouring sizes, each at most `max_tokens` with its padding.

    Of all such splits, this is the one with the fewest tokens, padding included, plus `PASS` per group.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    cheapest = [(0, 0)]  # for the n longest rows: the cost, and where their last group begins
    for end in range(1, len(order) + 1):
        padded = {start: sizes[order[start]] * (end - start) for start in range(end)}
        fits = [start for start in padded if padded[start] <= max_tokens or start == end - 1]
        cheapest.append(min((cheapest[start][0] + padded[start] + PASS, start) for start in fits))
    groups: list[list[int]] = []
    end = len(order)
    while end:
        start = cheapest[end][1]
        groups.insert(0, order[start:end])
        end = start
    return groups


def token_weights(lengths: Tensor, reduction: Reduction, all_sum: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight of one token of each response in the loss of an optimizer step, [B] float64.

    token: 1 / (tokens of all ranks). sequence: 1 / (responses of all ranks x tokens of its own response), the
    formula of arXiv:2602.12275. `all_sum` adds up a tensor over the ranks. The weights do not depend on the split into
    micro-batches or ranks.
    """
    counts = all_sum(torch.tensor([float(lengths.sum()), float(len(lengths))], dtype=torch.float64))
    if reduction == "token":
        return torch.full((len(lengths),), 1.0, dtype=torch.float64) / counts[0].cpu()
    return 1.0 / (counts[1].cpu() * lengths.double())
