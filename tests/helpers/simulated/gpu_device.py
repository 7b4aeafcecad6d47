"""A GPU that is not there: tensors of the device `sim` compute on the CPU, and refuse what a GPU refuses.

A tensor of this device keeps its numbers in a CPU tensor. Every operation checks that its tensors are on one device, is
counted, and computes the real result. What a GPU would have to wait for is counted as well. Use it in a process of its
own: torch registers such a device once, for all that follows.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "sim"
torch.utils.rename_privateuse1_backend(NAME)
DEVICE = torch.device(NAME, 0)
aten = torch.ops.aten
MAY_MIX = {
    aten.copy_.default,
    aten._to_copy.default,
    aten._copy_from.default,
    aten.index.Tensor,
    aten.index_put_.default,
}
"""Operations that take tensors of two devices: copies, and indices, which a GPU gets from the CPU."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "_reshape_alias",
}
IN_AUTOCAST = ("linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")


class Counts:
    """What ran on the device.

    Attributes:
        kernels: how often each operation ran, without views and new memory.
        syncs: the operations that a GPU's host waits for.
    """

    def __init__(self) -> None:
        self.kernels: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def add(self, func: Any, args: Any, on_device: bool, to_cpu: bool) -> None:
        """Count one operation."""
        name = func._schema.name.removeprefix("aten::")
        masks = func is aten.index.Tensor and any(x is not None and x.dtype == torch.bool for x in args[1])
        if func in WAITS or masks or to_cpu:
            self.syncs[name] += 1
        elif on_device and not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1


_counting: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Within, the device's operations are counted."""
    counts = Counts()
    _counting.append(counts)
    yield counts
    _counting.remove(counts)


def count(name: str) -> None:
    """Count a kernel that is computed past the device's operations."""
    for counts in _counting:
        counts.kernels[name] += 1


class OnDevice(Tensor):
    """A tensor of the device, around the CPU tensor with its numbers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnDevice":
        place = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.size(), dtype=inner.dtype, device=DEVICE, **place)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """The numbers, for which a GPU's host waits."""
        for counts in _counting:
            counts.syncs["tolist"] += 1
        return self.inner.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner})"


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Check the devices, count, compute on the CPU."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnDevice)]
    here = [x for x in tensors if not isinstance(x, OnDevice)]
    if there and func not in MAY_MIX and any(x.dim() > 0 for x in here):
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device: {[str(x.device) for x in tensors]}")
    given = kwargs.get("device")
    target = torch.device(given).type if given is not None else NAME if there else "cpu"
    if func is aten.copy_.default:
        target = args[0].device.type
    for counts in _counting:
        counts.add(func, args, target == NAME, bool(there) and target == "cpu")
    inner_args, inner_kwargs = tree_map_only(OnDevice, lambda x: x.inner, (args, kwargs))
    if given is not None:
        inner_kwargs["device"] = torch.device("cpu")
    with torch._C._DisableTorchDispatch():
        result = _compute(func, inner_args, inner_kwargs)
    if target == NAME:
        result = tree_map_only(Tensor, OnDevice, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result on the CPU, also of what only a GPU computes."""
    if func is aten.addmm.dtype_out:
        total, left, right, dtype = args
        return kwargs["out"].copy_(torch.addmm(total.to(dtype), left.to(dtype), right.to(dtype)))
    if func is aten._to_copy.default:  # a copy, though on the CPU both are one device
        return (
            func(*args, **kwargs).clone()
            if args[0].dtype == kwargs.get("dtype", args[0].dtype)
            else func(*args, **kwargs)
        )
    return func(*args, **kwargs)


class _Module(_DummyBackendModule):
    """The device's module, `torch.sim`."""

    def is_available(self) -> bool:
        """Not to those who look for a device: only tensors that name it are on it."""
        return False

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        torch.set_rng_state(state)


def _cast(function: Callable[..., Any]) -> Callable[..., Any]:
    """A product as autocast computes it."""
    without = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype(NAME)
        args, kwargs = tree_map_only(Tensor, lambda x: x.to(dtype) if x.dtype == torch.float32 else x, (args, kwargs))
        with torch._C._ExcludeDispatchKeyGuard(without):
            return function(*args, **kwargs)

    return cast


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    first, second = (x.inner if isinstance(x, OnDevice) else x for x in (source, target))
    second.copy_(first)
    return target


def _empty(size: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> Tensor:
    return OnDevice(torch.empty_strided(size, stride, dtype=dtype))


def _keeping_ties(apply: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """`nn.Module._apply` that leaves shared parameters shared: torch makes new ones for a tensor of another kind."""

    def applied(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = dict(module.named_parameters(remove_duplicate=False))
        apply(module, function, recurse)
        first: dict[int, nn.Parameter] = {}
        for name, old in before.items():
            owner, _, own = name.rpartition(".")
            part = module.get_submodule(owner)
            setattr(part, own, first.setdefault(id(old), getattr(part, own)))
        return module

    return applied


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
_every, _library = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
_every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
_every.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
# `torch.tensor` reaches the device where no fallback in Python can.
_library.impl("empty.memory_format", _empty, "PrivateUse1")
_library.impl("empty_strided", _empty_strided, "PrivateUse1")
_library.impl("_copy_from", _copy_from, "PrivateUse1")
for _name in IN_AUTOCAST:
    _library.impl(_name, _cast(getattr(aten, _name).default), "AutocastPrivateUse1")
nn.Module._apply = _keeping_ties(nn.Module._apply)  # type: ignore[method-assign]
