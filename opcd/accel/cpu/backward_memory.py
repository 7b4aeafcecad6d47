"""Less memory in the backward pass of a student whose activations are recomputed: all its gradients come to be there.

On the way the heap gives back what the layers left free. The embedding's gradient is added row by row to that of the
head, which in many models is the same tensor: no second [V, H] of zeros is made.
"""

from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from opcd.accel.cpu.heap import trim_heap

LAYERS = 8
"""The heap gives back its free pages every so many layers; to map them anew takes time (docs/log.md)."""


def less_memory_in_backward(model: PreTrainedModel) -> None:
    """Do so in every backward pass on a CPU from here on."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers[::LAYERS]:
        layer.register_forward_hook(_give_back_in_backward)
    model.get_input_embeddings().register_forward_hook(_added_by_rows)


def _give_back_in_backward(module: nn.Module, arguments: Any, output: Any) -> None:
    states = output[0] if isinstance(output, tuple) else output
    if _learns_on_cpu(states):
        states.register_hook(lambda gradient: trim_heap())


def _added_by_rows(embedding: nn.Module, arguments: tuple[Tensor], states: Tensor) -> Tensor | None:
    """A forward hook whose result leaves the graph: its gradient goes into the weight's own, without autograd.

    Not on several ranks, where DDP and FSDP see a gradient only as autograd brings it.
    """
    if not (_learns_on_cpu(states) and _learns_rows(embedding)) or torch.distributed.is_initialized():
        _give_back_in_backward(embedding, arguments, states)
        return None
    leaf = states.detach().requires_grad_()
    leaf.register_hook(partial(_add_rows, embedding, *arguments))
    return leaf


def _learns_on_cpu(states: Tensor) -> bool:
    """Whether a gradient will come, and glibc's heap is where it is."""
    return states.requires_grad and states.device.type == "cpu"


def _learns_rows(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether it is trained and looks rows up, no more: Gemma's also scales them."""
    return type(module) is nn.Embedding and module.weight.requires_grad


def _add_rows(embedding: nn.Embedding, ids: Tensor, gradient: Tensor) -> None:
    trim_heap()
    weight = embedding.weight
    if weight.grad is None:  # no head has been there before
        weight.grad = torch.zeros_like(weight)
    kept = ids != (-1 if embedding.padding_idx is None else embedding.padding_idx)
    weight.grad.index_add_(0, ids[kept], gradient[kept])
