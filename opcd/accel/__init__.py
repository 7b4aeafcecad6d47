"""Faster computation, or less memory, on one kind of hardware. The method does not depend on it.

Call `accelerator(device)`: it imports a device's code only where a model runs on such a device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opcd.accel.packed_attention import Packed, Pair, Scoring, attend, attends_by_rows, attention_by_rows

__all__ = ["Accelerator", "accelerator"]


class Accelerator:
    """The interface to a device's own code. This class changes nothing: it serves every device without such code."""

    def prepare(self, model: PreTrainedModel) -> None:
        """Choose the attention of a model that will run on the device."""

    def prepare_recomputation(self, model: PreTrainedModel) -> None:
        """Save memory in the backward pass of a model with gradient checkpointing."""

    def mask_name(self, model: PreTrainedModel) -> str:
        """The transformers name of an attention that takes the same masks as the model's."""
        return str(model.config.get_text_config()._attn_implementation)

    def fast_linears(
        self, model: nn.Module, dtype: torch.dtype, steps: int, consume: bool = False
    ) -> AbstractContextManager[None]:
        """Within the context, linear layers compute in `dtype` from weights laid out for `steps` decode steps.

        With `consume`, the layers' own weights are empty afterwards.
        """
        return nullcontext()

    def packs_rows(self, model: PreTrainedModel) -> bool:
        """Whether `packed_attention` serves the model. Else packed rows get a mask."""
        return attends_by_rows(model, self.mask_name(model))

    def packed_attention(
        self, model: PreTrainedModel, layers: list[Pair], lengths: list[int]
    ) -> AbstractContextManager[None]:
        """Within the context, packed rows of `lengths` tokens attend to themselves and to a prefix.

        `layers` holds the prefix's keys and values, [1, groups, P, D] for each layer. Only where `packs_rows`.
        """
        return attention_by_rows(model, layers, lengths, self.attend_packed)

    def attend_packed(self, query: Tensor, own: Pair, shared: Pair, rows: Packed, scoring: Scoring) -> Tensor:
        """The attention of `packed_attention`, the fastest way that the device has."""
        return attend(query, own, shared, rows, scoring)

    def shared_start(self, model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Any] | None:
        """Arguments of a pass over `rows` rows whose first `tokens` are given once; None where this is not possible."""
        return None

    @contextmanager
    def phase(self, name: str, recompute: bool, idle: list[Tensor]) -> Iterator[None]:
        """Free memory around a phase of a step (sync with the rollout, teacher, student, loss, optimizer).

        Args:
            name: the phase.
            recompute: the student has gradient checkpointing: memory matters more than time.
            idle: weights that are not read before the next step.
        """
        yield

    def trim(self) -> None:
        """Return freed memory to the system."""

    def forget_pages(self, tensors: list[Tensor]) -> None:
        """Drop the pages of a file that tensors are mapped from; the next read maps them again."""


@cache
def _of_type(kind: str) -> Accelerator:
    if kind == "cpu":
        from opcd.accel.cpu.accelerator import CPUAccelerator

        return CPUAccelerator()
    return Accelerator()


def accelerator(device: torch.device | str) -> Accelerator:
    """The accelerator of a device."""
    return _of_type(torch.device(device).type)
