"""The output head of a language model: hidden states [N, H] -> logits [N, V], and its gradient chunk after chunk."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from opcd.losses.log_probs import at_least_float32, check_device, check_floating, check_positive

Projection = Tensor | nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap · tanh(scale · (hidden @ projectionᵀ + bias) / softcap), [N, H] -> [N, V].

    The projection runs in its own dtype or in autocast's, the rest in float32 (float64 stays float64).

    Raises:
        ValueError: the projection is not [V, H] floating point, the bias is not [V] or goes with a module or function
            (which has its own), or scale or softcap is not positive.
        TypeError: the projection is neither a tensor nor callable.
    """

    projection: Projection
    """[V, H], or what maps hidden states [N, H] to [N, V]: a module (an adapter on the head included) or a function."""

    bias: Tensor | None = None
    """[V], added to the product with a matrix; a module or function adds its own."""

    softcap: float | None = None
    """Bounds every logit to ±softcap: Gemma 2's ``final_logit_softcapping``. None: no bound."""

    scale: float = 1.0
    """Multiplies the logits before the bound: Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``."""

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")
        if self.softcap is not None:
            check_positive(self.softcap, "softcap")
        if isinstance(self.projection, Tensor):
            _check_matrix(self.projection, self.bias)
        elif not callable(self.projection):
            raise TypeError(f"a head is a Head, a matrix [V, H], a module or a function, not {type(self.projection)}")
        elif self.bias is not None:
            raise ValueError("bias goes with a projection that is a matrix; a module or function adds its own")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of the hidden states [N, H], in float32 (float64 stays float64)."""
        logits = at_least_float32(self._project(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def vocabulary_size(self, hidden: Tensor) -> int:
        """V, the length of a row of logits; a module or function is called with one row like ``hidden`` [N, H]."""
        if isinstance(self.projection, Tensor):
            return self.projection.shape[0]
        return self(hidden.new_zeros(1, hidden.shape[-1])).shape[-1]

    def trainable(self, hidden: Tensor) -> list[Tensor]:
        """The tensors that get a gradient beside hidden states like ``hidden`` [N, H]: matrix, bias, adapter."""
        if (plain := self._plain()) is not None:
            return [weight for weight in plain if weight is not None and weight.requires_grad]
        with torch.enable_grad():
            return _leaves(self(hidden.new_zeros(1, hidden.shape[-1])))

    def accumulating(self, sums: list[Tensor]) -> "Head":
        """A head whose backward pass adds a plain matrix's gradient to ``sums[0]``; ``sums`` are as in `trainable`."""
        plain = self._plain()
        if plain is None or not sums or not plain[0].requires_grad:
            return self
        return replace(self, projection=_AccumulatingProduct(*plain, sums[0]), bias=None)

    @property
    def is_plain(self) -> bool:
        """Whether the logits are a new product with a matrix; a function may keep a reference to its result."""
        return isinstance(self.projection, _AccumulatingProduct) or self._plain() is not None

    @property
    def is_function(self) -> bool:
        """Whether the projection is neither a matrix nor a module: it may close over results of a graph."""
        return not isinstance(self.projection, Tensor | nn.Module)

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Matrix and bias, where the projection is their product with the hidden states and nothing else."""
        if isinstance(self.projection, Tensor):
            return self.projection, self.bias
        linear = self.projection
        hooked = getattr(linear, "_forward_hooks", None) or getattr(linear, "_forward_pre_hooks", None)
        if type(linear) is nn.Linear and not hooked and type(linear.weight.data) is Tensor:
            return linear.weight, linear.bias
        return None

    def _project(self, hidden: Tensor) -> Tensor:
        if isinstance(self.projection, Tensor):
            return _product(hidden, self.projection, self.bias)
        if isinstance(self.projection, nn.Module):
            # The first floating-point parameter's dtype; a quantized module converts any dtype itself.
            dtypes = (p.dtype for p in self.projection.parameters() if p.is_floating_point())
            hidden = hidden.to(next(dtypes, hidden.dtype))
        return self.projection(hidden)


def as_head(head: Head | Projection) -> Head:
    """A ``Head`` as it is; a matrix [V, H], a module or a function as a plain ``Head`` over it."""
    return head if isinstance(head, Head) else Head(head)


def _product(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ matrixᵀ + bias in the matrix's dtype, or in autocast's."""
    check_device(hidden, "hidden states", matrix, "the head's matrix")
    if hidden.shape[-1] != matrix.shape[1]:
        raise ValueError(
            f"hidden states are {list(hidden.shape)} and the head's matrix {list(matrix.shape)}: their last sizes must "
            "be equal; was the other model's head given?"
        )
    return nn.functional.linear(hidden.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype))


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaves of a tensor's graph, each once."""
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def _check_matrix(matrix: Tensor, bias: Tensor | None) -> None:
    check_floating(matrix, "the values of the head's matrix")
    if matrix.dim() != 2:
        raise ValueError(f"the head's matrix is {list(matrix.shape)}; it must be [V, H], as lm_head.weight is")
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise ValueError(f"the head's bias is {list(bias.shape)}; a matrix {list(matrix.shape)} goes with [V]")


class _AccumulatingProduct:
    """``hidden @ matrixᵀ + bias``, [n, H] -> [n, V]; its backward pass adds the matrix's gradient to ``total`` [V, H].

    Autograd would make a tensor [V, H] for every chunk and then add it: half a gigabyte each at 150,000 x 900. The
    matrix is cast once to autocast's dtype. On a CPU every product overwrites the one before; a GPU's allocator gives
    the same block again.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, total: Tensor) -> None:
        kind = matrix.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype
        self.matrix, self.bias, self.total = matrix.detach().to(dtype), bias, total
        self._memory = self.matrix.new_empty(0).untyped_storage()
        self.share = self.matrix.new_empty(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The product in the matrix's dtype. The bias is added in its own dtype, and autograd makes its gradient."""
        product: Tensor = _ProductFunction.apply(hidden.to(self.matrix.dtype), self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def room(self, rows: int) -> Tensor | None:
        """The block [rows, V] for every product. It is no view, so autograd lets it be overwritten. None on a GPU."""
        if self.matrix.device.type != "cpu":
            return None
        values = self.matrix.new_empty(0)
        if self._memory.nbytes() < rows * len(self.matrix) * values.itemsize:
            self._memory = self.matrix.new_empty(rows, len(self.matrix)).untyped_storage()
        return values.set_(self._memory, 0, (rows, len(self.matrix)))  # type: ignore[no-any-return, call-overload]


@cache
def adds_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device adds a product of short numbers to a float32 matrix in place; tried once, with its values.

    A CPU does not (torch 2.13), and older releases refuse a float32 matrix on a GPU too.
    """
    if device.type == "cpu" or dtype == torch.float32:
        return False
    total = torch.ones(32, 32, device=device)
    left, right = (torch.full((32, 16), value, dtype=dtype, device=device) for value in (3.0, 0.5))
    try:
        torch.addmm(total, left, right.T, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError
        return False
    return bool((total == 25.0).all())  # 1 + 16 · 3 · 0.5


class _ProductFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, product: _AccumulatingProduct) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.product = product
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.mm(hidden, product.matrix.T, out=product.room(len(hidden)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        (hidden,), product = ctx.saved_tensors, ctx.product
        total = product.total
        if total.dtype == hidden.dtype:
            total.addmm_(upstream.T, hidden)
        elif adds_in_float32(hidden.device, hidden.dtype) and total.dtype == torch.float32:
            torch.addmm(total, upstream.T, hidden, out_dtype=torch.float32, out=total)
        else:  # low precision is added up in float32
            total.add_(torch.mm(upstream.T, hidden, out=product.share))
        return (upstream @ product.matrix if ctx.needs_input_grad[0] else None), None
