"""Responses that were written once, and how far a model is from the distribution that was recorded on them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd.data.batch import Prompts
from opcd.losses import ForwardKL, RecordedTopK, TopK
from opcd.losses.log_probs import log_probs
from opcd.modules.lm.generation import eval_mode, own_precision
from opcd.modules.lm.hidden_states import HiddenStates, Routed, TeacherOutput
from opcd.modules.objective import Objective
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories, Trajectory

KEPT = 1024
"""Tokens of each position that are recorded. The rest of the vocabulary counts as one outcome."""
POSITIONS = 128
"""Positions whose logits are in memory at once."""


@dataclass
class Divergences:
    """The divergence on each of B responses.

    Attributes:
        nats: the sum over a response's tokens.
        tokens: how many tokens that is.
    """

    nats: list[float]
    tokens: list[int]

    @property
    def is_finite(self) -> bool:
        """Whether all of them are; weights that are not finite give none."""
        return all(map(math.isfinite, self.nats))

    @property
    def mean(self) -> float:
        """In nats a token, over all tokens."""
        return sum(self.nats) / sum(self.tokens)


@dataclass
class FixedResponses(Prompts):
    """Responses with the reference's likeliest tokens at each position.

    KL(reference || model) is computed over the `KEPT` likeliest tokens and the rest as one outcome: at most the KL over
    the whole vocabulary, by the data-processing inequality. docs/log.md has by how much less.

    Attributes:
        rows: B responses with their prompts.
        reference: of each response [R, k] token ids and log-probabilities.
    """

    rows: list[Trajectory]
    reference: list[RecordedTopK]

    @classmethod
    def of(cls, trajectories: Trajectories, said: TeacherOutput, vocabulary: int) -> FixedResponses:
        """Record what a teacher says about the tokens of these responses.

        Args:
            trajectories: the responses.
            said: the teacher's output for all their tokens.
            vocabulary: the size of the student's; what a teacher has beyond it is padding.

        Raises:
            ValueError: only the log-probabilities of the sampled tokens are known, which give no divergence.
        """
        return cls(trajectories.rows, _recorded(said, trajectories.lengths.tolist(), vocabulary))

    @classmethod
    @torch.no_grad()
    def of_student(cls, student: Student, trajectories: Trajectories, max_tokens: int) -> FixedResponses:
        """Record the student's own distribution, without the context; `max_tokens` is the most of a forward pass."""
        found: dict[int, RecordedTopK] = {}
        for numbers, part in _passes(student, trajectories, max_tokens):
            parts = _recorded(student.score(part), part.lengths.tolist(), student.vocabulary)
            found |= dict(zip(numbers, parts, strict=True))
        return cls(trajectories.rows, [found[number] for number in range(len(trajectories))])

    @torch.no_grad()
    def divergences(self, student: Student, max_tokens: int) -> Divergences:
        """KL(reference || student) without the context, at temperature 1.

        `max_tokens` is the most of one forward pass.
        """
        k = min(reference.tokens.shape[1] for reference in self.reference)
        objective = Objective(TopK(ForwardKL(), k, support="teacher"), temperature=1.0, max_nats=None)
        trajectories, nats = Trajectories(self.rows), [0.0] * len(self)
        for numbers, part in _passes(student, trajectories, max_tokens):
            recorded = [self.reference[number] for number in numbers]
            tokens = torch.cat([one.tokens[:, :k] for one in recorded])
            reference = RecordedTopK(tokens, torch.cat([one.log_probs[:, :k] for one in recorded]))
            values = objective(student.score(part), reference, part)["divergence"]
            for number, row in zip(numbers, values.split(part.lengths.tolist()), strict=True):
                nats[number] = float(row.double().sum())
        return Divergences(nats, trajectories.lengths.tolist())

    def state_dict(self) -> dict[str, Any]:
        """Token ids and log-probabilities, for a checkpoint. The teacher's prompts are not in it."""
        return {
            "prompts": [row.student_prompt.cpu() for row in self.rows],
            "responses": [row.response.cpu() for row in self.rows],
            "tokens": [reference.tokens.int().cpu() for reference in self.reference],
            "log_probs": [reference.log_probs.cpu() for reference in self.reference],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], device: torch.device) -> FixedResponses:
        """Undo `state_dict`."""
        prompts = ([value.to(device) for value in state[name]] for name in ("prompts", "responses"))
        rows = [Trajectory(prompt, prompt, prompt[:0], response) for prompt, response in zip(*prompts, strict=True)]
        pairs = zip(state["tokens"], state["log_probs"], strict=True)
        return cls(rows, [RecordedTopK(ids.long().to(device), values.to(device)) for ids, values in pairs])


def _recorded(said: TeacherOutput, lengths: list[int], vocabulary: int) -> list[RecordedTopK]:
    """A record a response, from what a model says of all their tokens."""
    if isinstance(said, Routed):
        found: dict[int, RecordedTopK] = {}
        for rows, part in said.parts.values():
            found |= dict(zip(rows, _recorded(part, [lengths[row] for row in rows], vocabulary), strict=True))
        return [found[row] for row in range(len(lengths))]
    if isinstance(said, HiddenStates):
        said = likeliest(said, KEPT, vocabulary)
    if not isinstance(said, RecordedTopK):
        raise ValueError("it gives the log-probability of the sampled token alone")
    columns = zip(said.tokens.split(lengths), said.log_probs.split(lengths), strict=True)
    return [RecordedTopK(tokens, values) for tokens, values in columns]


@torch.no_grad()
def likeliest(states: HiddenStates, k: int, vocabulary: int, temperature: float = 1.0) -> RecordedTopK:
    """The k likeliest tokens of N positions, out of a vocabulary's first tokens."""
    columns: list[tuple[Tensor, Tensor]] = []
    for hidden in states.hidden.split(POSITIONS):
        of_all = log_probs(states.head(hidden)[:, :vocabulary], temperature)
        values, tokens = of_all.topk(min(k, of_all.shape[-1]), -1)
        columns.append((tokens, values))
    return RecordedTopK(*(torch.cat(column) for column in zip(*columns, strict=True)))


def _passes(student: Student, trajectories: Trajectories, max_tokens: int) -> Iterator[tuple[list[int], Trajectories]]:
    """The row numbers and the rows of each forward pass, in eval mode."""
    with eval_mode(student.model), own_precision(student.model):
        for numbers in trajectories.micro_batches(max_tokens):
            yield numbers, trajectories.select(numbers)
    student.reshard()
