"""Linear layers in oneDNN's own layout while a model generates on a CPU.

A decode step multiplies a few rows with every weight once. From the usual layout that takes 1.7 times as long as from
the one that oneDNN would choose (docs/log.md), and torch has no public call for it: this is what its compiler uses.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MOST_BYTES = 2 * 2**30
"""The packed weights of larger models are not made: they take this much beside the weights."""

FEWEST_STEPS = 16
"""Packing takes as long as two or three decode steps; shorter generations do without."""


@contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype, rows: int, steps: int) -> Iterator[None]:
    """Within, the model's linear layers compute in ``dtype`` from packed copies of the weights of this moment.

    Nothing happens where it cannot help: off a CPU, in another type than bfloat16 (or where the CPU or this build of
    torch has no such kernel), for fewer than ``FEWEST_STEPS`` decode steps or more than ``MOST_BYTES`` of weights.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    size = sum(linear.weight.numel() * dtype.itemsize for linear in linears)
    if steps < FEWEST_STEPS or size > MOST_BYTES or not _has_kernel(linears, dtype):
        yield
        return
    try:
        for linear in linears:
            vars(linear)["forward"] = _packed(linear, dtype, rows)  # before the class's own
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _has_kernel(linears: list[nn.Linear], dtype: torch.dtype) -> bool:
    if dtype != torch.bfloat16 or any(linear.weight.device.type != "cpu" for linear in linears):
        return False
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    operations = ("_reorder_linear_weight", "_linear_pointwise")
    return supported is not None and bool(supported()) and all(hasattr(torch.ops.mkldnn, name) for name in operations)


def _packed(linear: nn.Linear, dtype: torch.dtype, rows: int) -> Callable[[Tensor], Tensor]:
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
    bias = None if linear.bias is None else linear.bias.detach().to(dtype)
    return partial(_product, weight, bias)


def _product(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """hidden @ weightᵀ + bias, [..., H] -> [..., V]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden.to(weight.dtype), weight, bias, "none", [], "")
    return result
