"""A function of many rows, chunk by chunk, whose gradient is computed together with its values."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Walk:
    """A function of ``rows`` rows of ``inputs`` at a time; only the first input and the leaves get a gradient."""

    function: Callable[[list[Tensor]], Callable[..., tuple[Tensor, ...]]]
    """Sums [leaf's shape] -> a function of tensors [n, ...] that gives tensors [n]; the gradient is that of its first.
    Its backward pass may add a leaf's gradient to the sum itself, and autograd does not see that leaf then."""
    rows: int
    inputs: tuple[Tensor, ...]
    """Tensors [N, ...]."""
    leaves: list[Tensor]
    """What the function closes over and is trained."""
    retain_graph: bool
    """Whether chunks share a part of the graph, beyond the leaves."""

    def values(self) -> tuple[Tensor, ...]:
        """A tuple of [N]."""
        one_chunk = self.function([])
        results = [one_chunk(*part) for part in self._parts()]
        return tuple(torch.cat(result) for result in zip(*results, strict=True))

    def gradients(self, weights: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The values, and the gradient of ``(weights * values[0]).sum()`` in the first input and in the leaves."""
        of_input, sums = torch.empty_like(self.inputs[0]), [torch.zeros_like(leaf) for leaf in self.leaves]
        one_chunk, results = self.function(sums), []
        for part, weight, room in zip(self._parts(), weights.split(self.rows), of_input.split(self.rows), strict=True):
            first = part[0].detach().requires_grad_()
            with torch.enable_grad():
                value, *others = one_chunk(first, *part[1:])
            gradient, *found = torch.autograd.grad(
                value, [first, *self.leaves], weight.to(value), retain_graph=self.retain_graph, allow_unused=True
            )
            room.copy_(gradient)
            for total, of_chunk in zip(sums, found, strict=True):
                if of_chunk is not None:
                    total.add_(of_chunk)
            results.append((value.detach(), *others))
        values = tuple(torch.cat(result) for result in zip(*results, strict=True))
        return values, [of_input, *sums]

    def _parts(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(x, self.rows) for x in self.inputs), strict=True)


def with_gradient(walk: Walk, weights: Tensor | None) -> tuple[Tensor, ...]:
    """The walk's values, the first with a gradient to the first input and the leaves.

    ``weights`` [N] is what the loss will give each value, up to a factor (None: all the same). A backward pass that
    gives them otherwise is right as well, and walks once more.
    """
    hidden = walk.inputs[0]
    weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights.detach()
    return _WithGradient.apply(walk, weights, hidden, *walk.leaves)  # type: ignore[no-any-return, no-untyped-call]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Walk, weights: Tensor, hidden: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        """The values, and what the gradient needs."""
        ctx.walk, ctx.weights, ctx.same_conditions = walk, weights, _conditions(hidden.device)
        values, ctx.gradients = walk.gradients(weights)
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of each input."""
        # Not kept: what nobody else holds becomes a parameter's .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        factor = _factor(upstream, ctx.weights.to(upstream))
        if gradients is None or factor is None:
            gradients = None
            with ctx.same_conditions():
                _, gradients = ctx.walk.gradients(upstream)
        elif factor != 1.0:
            gradients = [gradient.mul_(factor) for gradient in gradients]
        return None, None, *gradients


def _factor(upstream: Tensor, weights: Tensor) -> float | None:
    """c with upstream = c * weights to rounding, [N] x2; None where there is none."""
    if not len(weights):
        return 1.0
    if torch.equal(upstream, weights):
        return 1.0
    largest = weights.abs().argmax()
    factor = upstream[largest] / weights[largest]
    close = torch.allclose(upstream, factor * weights, rtol=4 * torch.finfo(upstream.dtype).eps, atol=0.0)
    return float(factor) if close else None


def _conditions(device: torch.device) -> Callable[[], Any]:
    """A context manager that brings back the autocast and the random numbers of this moment."""
    kind = device.type
    autocast = (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if kind == "cuda" else None

    @contextmanager
    def again() -> Iterator[None]:
        """As at that moment."""
        with torch.random.fork_rng([device] if gpu is not None else []):
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, device)
            with torch.autocast(kind, autocast[0], enabled=autocast[1]):
                yield

    return again
