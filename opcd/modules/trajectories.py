"""Responses with the prompts of both views, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from opcd.data import Batch
from opcd.data.batch import Prompts
from opcd.runtime.errors import UserError

Reduction = Literal["token", "sequence"]

PASS = 256
"""Tokens that one more pass is taken to cost (an estimate): weights are cast, and gradients added up, once a pass."""


@dataclass
class Trajectory:
    """A response, and the prompts that it follows.

    Attributes:
        student_prompt: [P] token ids: the query without the context.
        teacher_prompt: [Q] token ids: the query with the context.
        teacher_prefix: [P] token ids that the teacher prompts of one context have in common at their beginning
            (`Views.teacher_prefix`).
        response: [R] token ids, R >= 1. It ends with its first end-of-sequence token or at the length limit, so every
            token of it counts.
        ended: whether it ended by itself.
        log_probs: [R]: log p(y) in nats of each token under the policy that wrote it, at temperature 1; None where that
            is not known.
        teacher: the name of the teacher that scores it; None where there is only one.
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
        """Of the student's prompt and the response."""
        return len(self.student_prompt) + len(self.response)


@dataclass
class Trajectories(Prompts):
    """The responses of a step, or of a micro-batch of it.

    Attributes:
        rows: B of them.
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
        """Join a batch with a response an example; what follows a response's first end-of-sequence token is cut.

        Responses and log-probabilities come to the prompts' device: an engine or a file gives them on the CPU.

        Raises:
            UserError: a response has no token at all, so that there is nothing to compare.
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
        """Of each row, [R]."""
        return [row.response for row in self.rows]

    @property
    def ended(self) -> list[bool]:
        """Of each row."""
        return [row.ended for row in self.rows]

    @property
    def log_probs(self) -> list[Tensor | None]:
        """Of each row, [R]."""
        return [row.log_probs for row in self.rows]

    @property
    def teachers(self) -> list[str | None]:
        """Of each row."""
        return [row.teacher for row in self.rows]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [B] int64."""
        return torch.tensor([len(response) for response in self.responses])

    @property
    def longest(self) -> int:
        """Tokens of the longest student row."""
        return max(row.tokens for row in self.rows)

    @property
    def empty(self) -> int:
        """How many responses are an end-of-sequence token and nothing else."""
        return sum(len(row.response) == 1 and row.ended for row in self.rows)

    def select(self, rows: list[int]) -> Trajectories:
        """The trajectories at `rows`, in that order."""
        return Trajectories([self.rows[row] for row in rows])

    def micro_batches(self, max_tokens: int) -> list[list[int]]:
        """Rows of each micro-batch: neighbours in length, so that little is padding, and at most `max_tokens`.

        Counted is rows x longest student row; a single row that is longer than that is a micro-batch of its own.
        """
        return length_groups([row.tokens for row in self.rows], max_tokens)


def first_sequence(response: Tensor, eos_ids: set[int]) -> Tensor:
    """The tokens up to and with the first end-of-sequence token: [R] -> [<= R]."""
    for position, token in enumerate(response.tolist()):
        if token in eos_ids:
            return response[: position + 1]
    return response


def length_groups(sizes: list[int], max_tokens: int) -> list[list[int]]:
    """Indices of `sizes` in groups of neighbouring sizes, each at most `max_tokens` with its padding.

    Of all such splits, the one with the fewest tokens, padding included, where each group counts `PASS` more.
    """
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    cheapest = [(0, 0)]  # tokens of the n longest rows, and the place where their last group begins
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
    """Weight of one token of each response in the loss of a whole optimizer step, [B] float64.

    token: 1 / (tokens of all ranks). sequence: 1 / (responses of all ranks x tokens of its own response), the
    formula of arXiv:2602.12275. `all_sum` adds a tensor up over the ranks. The weights do not depend on how the
    responses are split into micro-batches or ranks.
    """
    counts = all_sum(torch.tensor([float(lengths.sum()), float(len(lengths))], dtype=torch.float64))
    if reduction == "token":
        return torch.full((len(lengths),), 1.0, dtype=torch.float64) / counts[0].cpu()
    return 1.0 / (counts[1].cpu() * lengths.double())
