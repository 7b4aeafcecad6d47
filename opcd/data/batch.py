"""What a training step gets: examples and both views of them as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opcd.data.example import Example
from opcd.data.views import Views


@dataclass
class Row:
    """One example, and both views of it as token ids.

    Attributes:
        example: as it was read.
        context: what the teacher sees; None for a row to predict that has none.
        student_prompt: [P] int64: the query.
        teacher_prompt: [Q] int64: the same with the context, where there is one.
        teacher_prefix: [P] int64: what the teacher prompts of its context have in common at their beginning.
        response: [R] int64: the recorded response with its end-of-sequence token; None where there is none.
    """

    example: Example
    context: str | None
    student_prompt: Tensor
    teacher_prompt: Tensor
    teacher_prefix: Tensor
    response: Tensor | None

    @classmethod
    def encoded(cls, example: Example, context: str | None, views: Views) -> Row:
        """Both views of an example. UserError where a query does not fit the chat template."""
        own = torch.tensor(views.student_prompt(example))
        given = None if example.response is None else torch.tensor(views.response_ids(example.response))
        if context is None:
            return cls(example, None, own, own, torch.tensor([]).long(), given)
        taught = torch.tensor(views.teacher_prompt(example, context))
        return cls(example, context, own, taught, torch.tensor(views.teacher_prefix(context)).long(), given)

    def to(self, device: torch.device | str) -> Row:
        """A copy whose tensors are on `device`."""
        return replace(
            self,
            student_prompt=self.student_prompt.to(device),
            teacher_prompt=self.teacher_prompt.to(device),
            teacher_prefix=self.teacher_prefix.to(device),
            response=None if self.response is None else self.response.to(device),
        )


class Prompts:
    """What a batch and the responses to it have in common: rows with the prompts of both views."""

    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def student_prompts(self) -> list[Tensor]:
        """Of each row, [P]."""
        return [row.student_prompt for row in self.rows]

    @property
    def teacher_prompts(self) -> list[Tensor]:
        """Of each row, [Q]."""
        return [row.teacher_prompt for row in self.rows]

    @property
    def teacher_prefixes(self) -> list[Tensor]:
        """Of each row, [P]."""
        return [row.teacher_prefix for row in self.rows]


@dataclass
class Batch(Prompts):
    """Rows, unpadded.

    Attributes:
        rows: of the batch.
        views: what encoded them, by the names of their teachers (`Example.teacher`).
    """

    rows: list[Row]
    views: Mapping[str | None, Views]

    @classmethod
    def encoded(
        cls, examples: Sequence[Example], contexts: Sequence[str | None], views: Mapping[str | None, Views]
    ) -> Batch:
        """Both views of each example, with its context. UserError where a query does not fit the chat template."""
        pairs = zip(examples, contexts, strict=True)
        return cls([Row.encoded(example, context, views[example.teacher]) for example, context in pairs], views)

    @property
    def examples(self) -> list[Example]:
        """Of each row."""
        return [row.example for row in self.rows]

    @property
    def contexts(self) -> list[str | None]:
        """Of each row."""
        return [row.context for row in self.rows]

    @property
    def responses(self) -> list[Tensor | None]:
        """Of each row, [R]."""
        return [row.response for row in self.rows]

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose tensors are on `device`. Lightning calls this."""
        return Batch([row.to(device) for row in self.rows], self.views)

    def asking(self, examples: Sequence[Example]) -> Batch:
        """Other examples in the place of these, under their contexts and on their device."""
        return Batch.encoded(examples, self.contexts, self.views).to(self.rows[0].student_prompt.device)

    def select(self, indices: Sequence[int]) -> Batch:
        """The batch of some of its rows, in the order of `indices`."""
        return Batch([self.rows[i] for i in indices], self.views)
