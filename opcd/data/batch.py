"""What a training step gets: examples and both views of them as token ids."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opcd.data.examples import Example


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
    """

    examples: list[Example]
    contexts: list[str | None]
    student_prompts: list[Tensor]
    teacher_prompts: list[Tensor]
    teacher_prefixes: list[Tensor]
    responses: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.examples)

    def to(self, device: torch.device | str) -> "Batch":
        """A copy whose tensors are on `device`. Lightning calls this."""
        return replace(
            self,
            student_prompts=[prompt.to(device) for prompt in self.student_prompts],
            teacher_prompts=[prompt.to(device) for prompt in self.teacher_prompts],
            teacher_prefixes=[prefix.to(device) for prefix in self.teacher_prefixes],
            responses=[None if response is None else response.to(device) for response in self.responses],
        )

    def select(self, indices: list[int]) -> "Batch":
        """The batch of some of its examples, in the order of `indices`."""
        return Batch(
            examples=[self.examples[i] for i in indices],
            contexts=[self.contexts[i] for i in indices],
            student_prompts=[self.student_prompts[i] for i in indices],
            teacher_prompts=[self.teacher_prompts[i] for i in indices],
            teacher_prefixes=[self.teacher_prefixes[i] for i in indices],
            responses=[self.responses[i] for i in indices],
        )
