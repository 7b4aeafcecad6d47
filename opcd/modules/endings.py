"""Whether student and teacher end a response with the same token: at the start of a run, on the first step's responses.

How it works: at the last token of each response that ended, both models' probabilities of every end-of-sequence token
are taken from the states that the loss has computed. One warning names the tokens and the figures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opcd.data import Views
from opcd.losses import RecordedTokens
from opcd.modules.lm.hidden_states import HiddenStates, Routed, TeacherOutput
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

FEW = 4
"""Ended responses below which a teacher that gives the end no probability is no finding."""
NEVER, OFTEN = 0.02, 0.2
"""A teacher that gives the end less than the first, where the student gives it more than the second, does not end."""
SEEN = 0.05
"""The probability of all end tokens above which it says which of them a model prefers."""


def merged_ends(student: Student, teacher: Teacher) -> Tensor:
    """The ids of all end tokens of the student and its teachers, [m] (UserError if there is only one)."""
    ids = student.eos_ids.union(*(part.end_ids(student) for part in teacher.parts.values()))
    if len(ids) < 2:
        name = student.tokenizer.convert_ids_to_tokens(sorted(ids))[0]
        raise UserError(f"model.merge_end_tokens has no effect: both models end with {name} only; remove it")
    return torch.tensor(sorted(ids))


class Endings:
    """Collects how the responses of the first step end, and warns of what the loss would teach wrongly.

    Args:
        student: its end tokens, and the tokenizer that names them.
        teacher: after `setup`.
        views: of the first batch, by the teacher's name.
        merged: whether the loss counts all end tokens as one outcome; which of them a model prefers is then no finding.
    """

    def __init__(self, student: Student, teacher: Teacher, views: Mapping[str | None, Views], merged: bool) -> None:
        self._tokenizer, self._merged, self._own = student.tokenizer, merged, student.eos_ids
        self._teachers = {name: part.end_ids(student) for name, part in teacher.parts.items()}
        self._keys = {name: part.key for name, part in teacher.parts.items()}
        written = {view.turn_end for view in views.values()} - {None}
        self._template = {int(end) for end in written if end is not None} - self._own
        self._ids = torch.tensor(sorted(self._own.union(self._template, *self._teachers.values())))
        self._seen: defaultdict[str | None, list[Tensor]] = defaultdict(list)
        self._rows = self._missed = 0

    @torch.no_grad()
    def add(self, student: HiddenStates, said: TeacherOutput, part: Trajectories, name: str | None = None) -> None:
        """Add the responses of a micro-batch: both models' outputs for their tokens, in row order."""
        if isinstance(said, Routed):
            by_row = student.hidden.split(part.lengths.tolist())
            for teacher, (rows, own) in said.parts.items():
                states = HiddenStates(torch.cat([by_row[row] for row in rows]), student.head)
                self.add(states, own, part.select(rows), teacher)
            return
        self._rows += len(part)
        self._missed += sum(not self._template.isdisjoint(response.tolist()) for response in part.responses)
        last = (part.lengths.cumsum(0) - 1)[torch.tensor(part.ended)]
        if len(last) and not isinstance(said, RecordedTokens):
            sides = [_probabilities(output, last, self._ids).double().cpu() for output in (student, said)]
            self._seen[name].append(torch.stack(sides, dim=1))

    def warn(self) -> None:
        """Warn once for each teacher, and of a template's end token at which the student goes on."""
        if self._missed:
            rank_zero_warn(
                f"{self._missed} of the first step's {self._rows} responses go on after {self._named(self._template)}, "
                "with which the chat template ends an assistant's turn: the student's generation stops at "
                f"{self._named(self._own)} only; add its id to eos_token_id in generation_config.json of model.student"
            )
        for name, key in self._keys.items():
            if problem := self._problem(self._teachers[name], self._seen[name], key):
                rank_zero_warn(problem)

    def _problem(self, ids: set[int], seen: list[Tensor], key: str) -> str | None:
        """What is wrong with a teacher; None if nothing is, or nothing is known."""
        remedy = "Set model.merge_end_tokens: true to count them as one, or give both models one end token"
        differ = f"the student ends a response with {self._named(self._own)}, {key} with {self._named(ids)}"
        if not seen:
            return f"{differ}. {remedy}" if ids and ids != self._own and not self._merged else None
        rows = torch.cat(seen)  # [rows, student and teacher, end tokens]
        mean, count = rows.mean(0), len(rows)
        figures = [self._figures(side) for side in mean]
        told = f"where {count} responses of the first step end, the student gives {figures[0]}, {key} {figures[1]}"
        own, theirs = mean.sum(-1).tolist()
        if count >= FEW and theirs < NEVER and own > OFTEN:
            return (
                f"{told}: the teacher would go on, and the loss teaches the student to do so. Unless the context asks "
                f"for longer answers, {key} ends with a token that its generation_config.json does not name"
            )
        if self._merged:
            return None
        if min(own, theirs) > SEEN and len(mean.argmax(-1).unique()) > 1:
            return f"{told}: they end with different tokens, so the loss works against the end of an answer. {remedy}"
        return f"{differ}; {told}. {remedy}" if theirs < SEEN and ids and ids != self._own else None

    def _named(self, ids: set[int]) -> str:
        return " or ".join(self._tokenizer.convert_ids_to_tokens(sorted(ids)))

    def _figures(self, probabilities: Tensor) -> str:
        """The probability of each end token."""
        names = self._tokenizer.convert_ids_to_tokens(self._ids.tolist())
        return " and ".join(f"{name} {p:.2f}" for name, p in zip(names, probabilities.tolist(), strict=True))


def _probabilities(output: TeacherOutput, places: Tensor, ids: Tensor) -> Tensor:
    """The probability of each of m tokens at e of the N positions, [e, m]; of a record, 0 for what it does not hold."""
    if isinstance(output, HiddenStates):
        device = output.hidden.device
        return output.head(output.hidden[places.to(device)]).softmax(-1)[:, ids.to(device)]
    assert not isinstance(output, Routed | RecordedTokens)
    places, ids = places.to(output.tokens.device), ids.to(output.tokens.device)
    found = output.tokens[places][:, None] == ids[:, None]  # [e, m, k]
    return (found * output.log_probs[places].exp()[:, None]).sum(-1)
