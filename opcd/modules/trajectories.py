"""Responses with the prompts of both views, and how they are cut into micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from opcd.data import Batch
from opcd.runtime.errors import UserError

Reduction = Literal["token", "sequence"]

PASS = 256
"""Tokens that one more pass is taken to cost (an estimate): weights are cast, and gradients added up, once a pass."""


@dataclass
class Trajectories:
    """B responses, and the prompts that they follow.

    Attributes:
        student_prompts: B tensors [P] of token ids: the query without the context.
        teacher_prompts: B tensors [Q] of token ids: the query with the context.
        teacher_prefixes: B tensors [P] of token ids that the teacher prompts of one context have in common at their
            beginning (`Views.teacher_prefix`).
        responses: B tensors [R], R >= 1, of token ids. Each ends with its first end-of-sequence token or at the
            length limit, so every token of it counts.
        ended: whether each response ended by itself, [B].
        log_probs: B tensors [R]: log p(y) in nats of each token under the policy that wrote it, at temperature 1; None
            where that is not known.
        teachers: names of the teachers that score them, [B]; None where there is only one.
    """

    student_prompts: list[Tensor]
    teacher_prompts: list[Tensor]
    teacher_prefixes: list[Tensor]
    responses: list[Tensor]
    ended: list[bool]
    log_probs: list[Tensor | None]
    teachers: list[str | None]

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
        for example, response in zip(batch.examples, responses, strict=True):
            if not len(response):
                raise UserError(f"{example.source}: the rollout wrote no token, not even an end-of-sequence token")
        cut = [first_sequence(response, eos_ids) for response in responses]
        ended = [int(response[-1]) in eos_ids for response in cut]
        given = log_probs or [None] * len(cut)
        kept = [each if each is None else each[: len(y)] for each, y in zip(given, cut, strict=True)]
        teachers = [example.teacher for example in batch.examples]
        prompts = (batch.student_prompts, batch.teacher_prompts, batch.teacher_prefixes)
        devices = [prompt.device for prompt in batch.student_prompts]
        there = [response.to(device) for response, device in zip(cut, devices, strict=True)]
        scores = [each if each is None else each.to(device) for each, device in zip(kept, devices, strict=True)]
        return cls(*prompts, there, ended, scores, teachers)

    @classmethod
    def joined(cls, parts: list[Trajectories]) -> Trajectories:
        """The rows of all parts, one part after the other."""
        names = [field.name for field in fields(cls)]
        return cls(*([row for part in parts for row in getattr(part, name)] for name in names))

    def __len__(self) -> int:
        return len(self.responses)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [B] int64."""
        return torch.tensor([len(response) for response in self.responses])

    @property
    def longest(self) -> int:
        """Tokens of the longest student row."""
        return max(len(p) + len(r) for p, r in zip(self.student_prompts, self.responses, strict=True))

    @property
    def empty(self) -> int:
        """How many responses are an end-of-sequence token and nothing else."""
        return sum(len(response) == 1 and over for response, over in zip(self.responses, self.ended, strict=True))

    def select(self, rows: list[int]) -> Trajectories:
        """The trajectories at `rows`, in that order."""
        columns = [getattr(self, field.name) for field in fields(self)]
        return Trajectories(*([column[row] for row in rows] for column in columns))

    def micro_batches(self, max_tokens: int) -> list[list[int]]:
        """Rows of each micro-batch: neighbours in length, so that little is padding, and at most `max_tokens`.

        Counted is rows x longest student row; a single row that is longer than that is a micro-batch of its own.
        """
        sizes = [len(p) + len(r) for p, r in zip(self.student_prompts, self.responses, strict=True)]
        return length_groups(sizes, max_tokens)


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
