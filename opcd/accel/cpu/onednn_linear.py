"""Linear layers in oneDNN's own layout while a model generates on a CPU.

A decode step multiplies a few rows with every weight once. With the usual layout this takes 1.7 times as long as with
oneDNN's (docs/log.md). torch has no public call for that layout: these are the operators that its compiler uses. Layers
that read the same states become one product.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from opcd.accel.precision import has_bfloat16

MOST_BYTES = 2 * 2**30
"""Weights are packed up to this size only: the packed copy comes on top of them."""

JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers of one module that usually read the same states."""

ROWS = 16
"""The number of rows that oneDNN optimizes for. With 1 it keeps the usual layout on some CPUs; from 4 on it packs."""

FEWEST_STEPS = 16
"""Shorter generations are not packed: packing takes as long as two or three decode steps."""


@contextmanager
def packed_linears(model: nn.Module, dtype: torch.dtype, steps: int, consume: bool = False) -> Iterator[None]:
    """Within the context, the model's linear layers compute in ``dtype`` from packed copies of the current weights.

    Nothing happens off a CPU, for a dtype other than float32 and bfloat16, where the CPU or this build of torch has no
    such kernel, for fewer than ``FEWEST_STEPS`` decode steps or for more than ``MOST_BYTES`` of weights.
    With ``consume``, the layers' own weights are emptied to free their memory, except those that another module reads.
    """
    linears = [m for m in model.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    size = sum(linear.weight.numel() * dtype.itemsize for linear in linears)
    if steps < FEWEST_STEPS or size > MOST_BYTES or not _has_kernel(linears, dtype):
        yield
        return
    readers = Counter(weight.data_ptr() for module in model.modules() for weight in module.parameters(recurse=False))
    try:
        for group in _groups(model, linears):
            product = partial(_product, *_packed(group, dtype))
            joined = _Joined(product, [linear.out_features for linear in group])
            for number, linear in enumerate(group):  # found before the class's forward
                vars(linear)["forward"] = partial(joined, number) if len(group) > 1 else product
                if consume and readers[linear.weight.data_ptr()] == 1:
                    linear.weight.untyped_storage().resize_(0)
        yield
    finally:
        for linear in linears:
            vars(linear).pop("forward", None)


def _groups(model: nn.Module, linears: list[nn.Linear]) -> list[list[nn.Linear]]:
    """The layers, grouped by what is computed together."""
    groups: list[list[nn.Linear]] = []
    known = set(linears)
    for module in model.modules():
        for names in JOINED:
            children = [child for name, child in module.named_children() if name in names]
            group = [child for child in children if isinstance(child, nn.Linear) and child in known]
            if len(group) == len(names) and len({linear.bias is None for linear in group}) == 1:
                groups.append(group)
    joined = {linear for group in groups for linear in group}
    return groups + [[linear] for linear in linears if linear not in joined]


def _has_kernel(linears: list[nn.Linear], dtype: torch.dtype) -> bool:
    if any(linear.weight.device.type != "cpu" for linear in linears) or not torch.backends.mkldnn.is_available():
        return False
    operations = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(torch.ops.mkldnn, name) for name in operations):
        return False
    low = dtype == torch.bfloat16 and has_bfloat16("cpu") and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(low) or dtype == torch.float32


def _packed(layers: list[nn.Linear], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The joined weight, packed, and the joined bias of the layers."""
    weights = [layer.weight.detach().to(dtype) for layer in layers]
    biases = [layer.bias.detach().to(dtype) for layer in layers if layer.bias is not None]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]  # cat would copy a single one
    return torch.ops.mkldnn._reorder_linear_weight(weight, ROWS), torch.cat(biases) if biases else None


def _product(weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """hidden @ weightᵀ + bias, [..., H] -> [..., V]."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(hidden.to(weight.dtype), weight, bias, "none", [], "")
    return result


class _Joined:
    """The results of several layers, computed once for as long as they are called with the same tensor."""

    def __init__(self, product: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self.product, self.sizes = product, sizes
        self._read: tuple[Tensor | None, int] = (None, 0)
        self._results: tuple[Tensor, ...] = ()

    def __call__(self, number: int, hidden: Tensor) -> Tensor:
        """The result of layer `number`, [..., H] -> [..., V]."""
        version = 0 if hidden.is_inference() else hidden._version
        if self._read[0] is not hidden or self._read[1] != version:
            self._read, self._results = (hidden, version), self.product(hidden).split(self.sizes, -1)
        return self._results[number]
