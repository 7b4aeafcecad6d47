"""What a training step gets: examples and both views of them as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opcd.data.example import Example
from opcd.data.views import Views


@dataclass
class Batch:
    """Examples and their token ids, unpadded. All lists have one entry an example.

    Attributes:
        examples: the rows as they were read.
        contexts: the context that the teacher sees; None for a row to predict that has none.
        student_prompts: [P] int64 each: the query.
        teacher_prompts: [Q] int64 each: the same with the context, where there is one.
        teacher_prefixes: [P] int64 each: what the teacher prompts of its context have in common at their beginning.
        responses: [R] int64 each: the recorded response with its end-of-sequence token; None where there is none.
        views: what encoded them, by the names of their teachers (`Example.teacher`).
    """

    examples: list[Example]
    contexts: list[str | None]
    student_prompts: list[Tensor]
    teacher_prompts: list[Tensor]
    teacher_prefixes: list[Tensor]
    responses: list[Tensor | None]
    views: Mapping[str | None, Views]

    @classmethod
    def encoded(
        cls, examples: Sequence[Example], contexts: list[str | None], views: Mapping[str | None, Views]
    ) -> Batch:
        """Both views of each example, with its context. UserError where a query does not fit the chat template."""
        rows = [(example, context, views[example.teacher]) for example, context in zip(examples, contexts, strict=True)]
        return cls(
            examples=list(examples),
            contexts=contexts,
            student_prompts=[torch.tensor(own.student_prompt(e)) for e, _, own in rows],
            teacher_prompts=[
                torch.tensor(own.student_prompt(e) if c is None else own.teacher_prompt(e, c)) for e, c, own in rows
            ],
            teacher_prefixes=[torch.tensor([] if c is None else own.teacher_prefix(c)).long() for _, c, own in rows],
            responses=[
                None if e.response is None else torch.tensor(own.response_ids(e.response)) for e, _, own in rows
            ],
            views=views,
        )

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device | str) -> Batch:
        """A copy whose tensors are on `device`. Lightning calls this."""
        return replace(
            self,
            student_prompts=[prompt.to(device) for prompt in self.student_prompts],
            teacher_prompts=[prompt.to(device) for prompt in self.teacher_prompts],
            teacher_prefixes=[prefix.to(device) for prefix in self.teacher_prefixes],
            responses=[None if response is None else response.to(device) for response in self.responses],
        )

    def asking(self, examples: Sequence[Example]) -> Batch:
        """Other examples in the place of these, under their contexts and on their device."""
        return Batch.encoded(examples, self.contexts, self.views).to(self.student_prompts[0].device)

    def select(self, indices: list[int]) -> Batch:
        """The batch of some of its examples, in the order of `indices`."""
        return Batch(
            examples=[self.examples[i] for i in indices],
            contexts=[self.contexts[i] for i in indices],
            student_prompts=[self.student_prompts[i] for i in indices],
            teacher_prompts=[self.teacher_prompts[i] for i in indices],
            teacher_prefixes=[self.teacher_prefixes[i] for i in indices],
            responses=[self.responses[i] for i in indices],
            views=self.views,
        )
