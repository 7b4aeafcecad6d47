"""Batches of a training step: examples, and both views of each as token ids."""

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
        example: the example as it was read.
        context: the context that the teacher sees; None for a row to predict without one.
        student_prompt: [P] int64: the query.
        teacher_prompt: [Q] int64: the query with the context, if there is one.
        teacher_prefix: [P] int64: the beginning that all teacher prompts with this context share.
        response: [R] int64: the recorded response with its end-of-sequence token; None if there is none.
    """

    example: Example
    context: str | None
    student_prompt: Tensor
    teacher_prompt: Tensor
    teacher_prefix: Tensor
    response: Tensor | None

    @classmethod
    def encoded(cls, example: Example, context: str | None, views: Views) -> Row:
        """Both views of an example. UserError if a query does not fit the chat template."""
        student = torch.tensor(views.student_prompt(example))
        response = None if example.response is None else torch.tensor(views.response_ids(example.response))
        if context is None:
            return cls(example, None, student, student, torch.tensor([]).long(), response)
        teacher = torch.tensor(views.teacher_prompt(example, context))
        return cls(example, context, student, teacher, torch.tensor(views.teacher_prefix(context)).long(), response)

    def to(self, device: torch.device | str) -> Row:
        """A copy whose tensors are on `device`."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **moved)


class Prompts:
    """The prompts of both views of some rows: shared by a batch and by the responses to it."""

    rows: list[Any]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def student_prompts(self) -> list[Tensor]:
        """The student's prompt of each row, [P]."""
        return [row.student_prompt for row in self.rows]

    @property
    def teacher_prompts(self) -> list[Tensor]:
        """The teacher's prompt of each row, [Q]."""
        return [row.teacher_prompt for row in self.rows]

    @property
    def teacher_prefixes(self) -> list[Tensor]:
        """The shared beginning of each row's teacher prompt, [P]."""
        return [row.teacher_prefix for row in self.rows]


@dataclass
class Batch(Prompts):
    """Rows, unpadded.

    Attributes:
        rows: the rows.
        views: the views that encoded them, by teacher name (`Example.teacher`).
    """

    rows: list[Row]
    views: Mapping[str | None, Views]

    @classmethod
    def encoded(
        cls, examples: Sequence[Example], contexts: Sequence[str | None], views: Mapping[str | None, Views]
    ) -> Batch:
        """Both views of each example with its context. UserError if a query does not fit the chat template."""
        pairs = zip(examples, contexts, strict=True)
        return cls([Row.encoded(example, context, views[example.teacher]) for example, context in pairs], views)

    @property
    def examples(self) -> list[Example]:
        """The example of each row."""
        return [row.example for row in self.rows]

    @property
    def contexts(self) -> list[str | None]:
        """The context of each row."""
        return [row.context for row in self.rows]

    @property
    def responses(self) -> list[Tensor | None]:
        """The recorded response of each row, [R]."""
        return [row.response for row in self.rows]

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose tensors are on `device`. Lightning calls this."""
        return Batch([row.to(device) for row in self.rows], self.views)

    def asking(self, examples: Sequence[Example]) -> Batch:
        """The same rows with other examples, under the same contexts and on the same device."""
        return Batch.encoded(examples, self.contexts, self.views).to(self.rows[0].student_prompt.device)

    def select(self, indices: Sequence[int]) -> Batch:
        """The batch of some of its rows, in the order of `indices`."""
        return Batch([self.rows[i] for i in indices], self.views)
