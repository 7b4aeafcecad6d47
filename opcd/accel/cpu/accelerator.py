"""What this package does for a step on a CPU, in one place."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opcd.accel.base import Accelerator, Pair
from opcd.accel.cpu import attention
from opcd.accel.cpu.backward_memory import less_memory_in_backward
from opcd.accel.cpu.heap import KEPT, LARGE, drop_file_pages, keep_freed_blocks, large_blocks_kept, trim_heap
from opcd.accel.cpu.onednn_linear import packed_linears
from opcd.accel.cpu.prefix_attention import attends_by_rows, attention_by_rows

TRIMMED = ("sync", "student", "loss", "optimizer")
"""Phases that leave freed blocks of many sizes."""
IDLE_AFTER = ("teacher", "loss")
"""Phases after which the teacher's weights (in the loss its head) have been read."""


class CPUAccelerator(Accelerator):
    """Its own attention, oneDNN's layout of weights, and a heap that gives back what it does not need.

    The first one changes how this process's C library keeps freed memory (`keep_freed_blocks`).
    """

    def __init__(self) -> None:
        keep_freed_blocks()

    def prepare(self, model: PreTrainedModel) -> None:
        """Use the attention of `attention.py` in the place of SDPA."""
        attention.use_cpu_attention(model)

    def prepare_recomputation(self, model: PreTrainedModel) -> None:
        """See `backward_memory.py`."""
        less_memory_in_backward(model)

    def mask_name(self, model: PreTrainedModel) -> str:
        """Its own attention takes SDPA's masks."""
        name = super().mask_name(model)
        return "sdpa" if name == attention.NAME else name

    def fast_linears(
        self, model: nn.Module, dtype: torch.dtype, steps: int, consume: bool = False
    ) -> AbstractContextManager[None]:
        """See `onednn_linear.py`."""
        return packed_linears(model, dtype, steps, consume)

    def packed_attention(
        self, model: PreTrainedModel, layers: list[Pair], lengths: list[int]
    ) -> AbstractContextManager[None] | None:
        """See `prefix_attention.py`."""
        return attention_by_rows(model, layers, lengths) if attends_by_rows(model) else None

    def shared_start(self, model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Any] | None:
        """An argument of its own attention."""
        own = model.config.get_text_config()._attn_implementation == attention.NAME
        return {attention.ROWS: (rows, tokens)} if own else None

    @contextmanager
    def phase(self, name: str, recompute: bool, idle: list[Tensor]) -> Iterator[None]:
        """Blocks of a loss stay in the heap while it runs; afterwards the heap and the file's pages are given back.

        With gradient checkpointing all of them, else what is beyond `KEPT` and `LARGE`: to map pages anew takes time.
        """
        # With checkpointing, holes that kept blocks leave between gradients cost more than new pages do.
        with large_blocks_kept() if name == "loss" and not recompute else nullcontext():
            yield
        if name in IDLE_AFTER and sum(weight.nbytes for weight in idle) >= (0 if recompute else LARGE):
            drop_file_pages(idle)
        if name in TRIMMED:
            trim_heap(beyond=0 if recompute else KEPT)

    def trim(self) -> None:
        """Return the heap's free pages."""
        trim_heap()

    def forget_pages(self, tensors: list[Tensor]) -> None:
        """See `heap.drop_file_pages`."""
        drop_file_pages(tensors)
