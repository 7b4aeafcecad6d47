"""hidden @ matrixᵀ, chunk after chunk, in one block of memory, with the gradient of the matrix added up in another."""

from typing import Any

import torch
from torch import Tensor


class AccumulatingProduct:
    """``hidden @ matrixᵀ + bias``, [n, H] -> [n, V]; its backward pass adds the matrix's gradient to ``total`` [V, H].

    Autograd would make a tensor of that size for every chunk and then add it: at 150,000 x 900 half a gigabyte each.
    The matrix is cast once to the type that autocast asks for. Every product overwrites the one before.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, total: Tensor) -> None:
        kind = matrix.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else matrix.dtype
        self.matrix, self.bias, self.total = matrix.detach().to(dtype), bias, total
        self._memory = self.matrix.new_empty(0).untyped_storage()
        self.share = self.matrix.new_empty(0)

    def __call__(self, hidden: Tensor) -> Tensor:
        """The product in the matrix's dtype; the bias, added in its own, gets its gradient from autograd."""
        product: Tensor = _Product.apply(hidden.to(self.matrix.dtype), self)  # type: ignore[no-untyped-call]
        return product if self.bias is None else product + self.bias

    def room(self, rows: int) -> Tensor:
        """The block [rows, V] that every product is written to: no view, so that autograd lets it be overwritten."""
        values = self.matrix.new_empty(0)
        if self._memory.nbytes() < rows * len(self.matrix) * values.itemsize:
            self._memory = self.matrix.new_empty(rows, len(self.matrix)).untyped_storage()
        return values.set_(self._memory, 0, (rows, len(self.matrix)))  # type: ignore[no-any-return, call-overload]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, product: AccumulatingProduct) -> Tensor:
        """The values, and what the gradient needs."""
        ctx.save_for_backward(hidden)
        ctx.product = product
        with torch.autocast(hidden.device.type, enabled=False):
            return torch.mm(hidden, product.matrix.T, out=product.room(len(hidden)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, None]:
        """The gradient of each input."""
        (hidden,), product = ctx.saved_tensors, ctx.product
        if product.total.dtype == hidden.dtype:
            product.total.addmm_(upstream.T, hidden)
        else:  # low precision is added up in float32
            product.total.add_(torch.mm(upstream.T, hidden, out=product.share))
        return (upstream @ product.matrix if ctx.needs_input_grad[0] else None), None
