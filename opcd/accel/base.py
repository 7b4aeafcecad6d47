"""What one kind of device computes faster, or in less memory, than plain torch: the seam to it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


class Accelerator:
    """Changes nothing: right for every device that has none of its own."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Choose the attention of a model that will run on the device."""

    def prepare_recomputation(self, model: PreTrainedModel) -> None:
        """Save memory in the backward pass of a model with gradient checkpointing."""

    def mask_name(self, model: PreTrainedModel) -> str:
        """The model's attention, as transformers names what takes the same masks."""
        return str(model.config.get_text_config()._attn_implementation)

    def fast_linears(
        self, model: nn.Module, dtype: torch.dtype, steps: int, consume: bool = False
    ) -> AbstractContextManager[None]:
        """Within, linear layers compute in `dtype` from weights laid out for `steps` decode steps.

        With `consume` their own weights are empty from then on.
        """
        return nullcontext()

    def packed_attention(
        self, model: PreTrainedModel, layers: list[Pair], lengths: list[int]
    ) -> AbstractContextManager[None] | None:
        """Within, rows of `lengths` tokens that are packed one after the other attend to themselves and to a prefix.

        `layers` are its keys and values, [1, groups, P, D] a layer. None: a mask must say so.
        """
        return None

    def shared_start(self, model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Any] | None:
        """Arguments of a pass over `rows` rows whose first `tokens` are given once; None where that is not possible."""
        return None

    @contextmanager
    def phase(self, name: str, recompute: bool, idle: list[Tensor]) -> Iterator[None]:
        """Around a phase of a step (sync with the rollout, teacher, student, loss, optimizer): memory goes to the next.

        Args:
            name: of the phase.
            recompute: the student has gradient checkpointing: memory matters more than time.
            idle: weights that are not read before the next step.
        """
        yield

    def trim(self) -> None:
        """Give freed memory back to the system."""

    def forget_pages(self, tensors: list[Tensor]) -> None:
        """Let go of the pages of a file that tensors are mapped from; the next read maps them anew."""
