"""All optimizations of a step on a CPU, in one place, and the backward pass that saves memory."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opcd.accel import Accelerator
from opcd.accel.cpu import attention
from opcd.accel.cpu.heap import KEPT, LARGE, drop_file_pages, keep_freed_blocks, large_blocks_kept, trim_heap
from opcd.accel.cpu.onednn_linear import packed_linears

TRIMMED = ("sync", "student", "loss", "optimizer")
"""Phases that leave freed blocks of many sizes."""
IDLE_AFTER = ("teacher", "loss")
"""Phases after which the teacher's weights (in the loss: its head) have been read."""
LAYERS = 8
"""In the backward pass the heap is trimmed every so many layers: mapping pages again takes time (docs/log.md)."""


def less_memory_in_backward(model: PreTrainedModel) -> None:
    """Save memory in every backward pass on a CPU of a model that recomputes its activations.

    The heap is trimmed between layers. The embedding's gradient is added row by row to the head's, which in many models
    is the same tensor: no second [V, H] of zeros is made.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[::LAYERS]:
        layer.register_forward_hook(_trim_in_backward)
    model.get_input_embeddings().register_forward_hook(_added_by_rows)


def _trim_in_backward(module: nn.Module, arguments: Any, output: Any) -> None:
    states = output[0] if isinstance(output, tuple) else output
    if _learns_on_cpu(states):
        states.register_hook(lambda gradient: trim_heap())


def _added_by_rows(embedding: nn.Module, arguments: tuple[Tensor], states: Tensor) -> Tensor | None:
    """A forward hook whose result leaves the graph: `_add_rows` writes the weight's gradient instead of autograd.

    Not used on several ranks: DDP and FSDP see only gradients that autograd brings. Nor for embeddings that do more
    than look rows up, such as Gemma's, which scale them.
    """
    if (
        type(embedding) is not nn.Embedding
        or not (embedding.weight.requires_grad and _learns_on_cpu(states))
        or torch.distributed.is_initialized()
    ):
        _trim_in_backward(embedding, arguments, states)
        return None
    leaf = states.detach().requires_grad_()
    leaf.register_hook(partial(_add_rows, embedding, *arguments))
    return leaf


def _learns_on_cpu(states: Tensor) -> bool:
    return states.requires_grad and states.device.type == "cpu"


def _add_rows(embedding: nn.Embedding, ids: Tensor, gradient: Tensor) -> None:
    trim_heap()
    weight = embedding.weight
    if weight.grad is None:  # the head has added none
        weight.grad = torch.zeros_like(weight)
    kept = ids != (-1 if embedding.padding_idx is None else embedding.padding_idx)
    weight.grad.index_add_(0, ids[kept], gradient[kept])


class CPUAccelerator(Accelerator):
    """Its own attention, oneDNN's layout of weights, and a heap that returns unused memory.

    The first instance changes how the process's C library keeps freed memory (`keep_freed_blocks`).
    """

    prepare = staticmethod(attention.use_cpu_attention)
    prepare_recomputation = staticmethod(less_memory_in_backward)
    fast_linears = staticmethod(packed_linears)
    trim = staticmethod(trim_heap)
    forget_pages = staticmethod(drop_file_pages)
    attend_packed = staticmethod(attention.attend_packed)

    def __init__(self) -> None:
        keep_freed_blocks()

    def mask_name(self, model: PreTrainedModel) -> str:
        """The model's attention; that of `attention.py` takes SDPA's masks."""
        name = super().mask_name(model)
        return "sdpa" if name == attention.NAME else name

    def shared_start(self, model: PreTrainedModel, rows: int, tokens: int) -> dict[str, Any] | None:
        """The argument `ROWS` of `attention.attention`; None for a model with another attention."""
        own = model.config.get_text_config()._attn_implementation == attention.NAME
        return {attention.ROWS: (rows, tokens)} if own else None

    @contextmanager
    def phase(self, name: str, recompute: bool, idle: list[Tensor]) -> Iterator[None]:
        """Keep the loss's blocks in the heap while it runs; afterwards return free heap and file pages to the kernel.

        With gradient checkpointing all are returned, else only what exceeds `KEPT` and `LARGE`: mapping pages again
        takes time.
        """
        # With checkpointing, kept blocks leave holes between gradients, which cost more than new pages do.
        with large_blocks_kept() if name == "loss" and not recompute else nullcontext():
            yield
        if name in IDLE_AFTER and sum(weight.nbytes for weight in idle) >= (0 if recompute else LARGE):
            drop_file_pages(idle)
        if name in TRIMMED:
            trim_heap(beyond=0 if recompute else KEPT)
