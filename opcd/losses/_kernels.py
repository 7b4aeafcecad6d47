"""Divergences of two models' log-probabilities, with their gradients in few passes over memory.

Each function maps ``log_p, log_q: [..., V]`` in nats to ``[...]`` in nats and is differentiable once in both. A token
that has probability zero in both models adds 0. The forward pass also computes the gradient, a few rows at a time; the
backward pass only multiplies each row by a factor. Autograd alone keeps more than twice as many tensors [..., V].

Probabilities of zero need masks, and are rare. A CPU looks at every sum and makes the masks where one is not finite. A
GPU would have to wait for each look: there the masks are always made, or, within ``assuming_finite``, for the few
columns of a top-k alone.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""The numbers in one block of rows on a CPU. With 2**19 glibc's heap keeps 50 MiB more."""


NARROW = 4096
"""Up to so many columns masks cost a GPU next to nothing, and a top-k's unused places make them usual."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), [..., V] x2 -> [...] in nats.

    A token with p = 0 adds 0, whatever q is. A token with p > 0 and q = 0 makes the value +inf but adds nothing to the
    gradient, so a row that is clipped or masked afterwards leaves no NaN.
    """
    return _ByRows.apply(log_p, log_q, _kl)  # type: ignore[no-any-return, no-untyped-call]


def jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float) -> Tensor:
    """β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m) with m = β·teacher + (1−β)·student, [..., V] x2 -> [...] in nats."""
    rows = partial(_jsd, beta)
    return _ByRows.apply(student_log_probs, teacher_log_probs, rows)  # type: ignore[no-any-return, no-untyped-call]


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p ‖ α·p + (1−α)·q), [..., V] x2 -> [...] in nats."""
    return _ByRows.apply(log_p, log_q, partial(_skew_kl, alpha))  # type: ignore[no-any-return, no-untyped-call]


Rows = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""Rows [n, V] of both models, and a tensor [n, V] for each gradient that is wanted (else None) -> values [n]."""


def _kl(log_p: Tensor, log_q: Tensor, of_p: Tensor | None, of_q: Tensor | None) -> Tensor:
    """d/dlog_p = p (log p − log q + 1), d/dlog_q = −p."""
    p, terms, value = _compare(log_p, log_q)
    if of_q is not None:
        torch.neg(p, out=of_q)
    if of_p is not None:
        torch.add(terms, p, out=of_p)
    return value


def _jsd(beta: float, log_s: Tensor, log_t: Tensor, of_s: Tensor | None, of_t: Tensor | None) -> Tensor:
    """d/dlog_s = (1−β) s (log s − log m), d/dlog_t = β t (log t − log m). The gradient through m cancels."""
    log_m = _log_mixture(log_t, log_s, beta)
    _, terms_s, from_student = _compare(log_s, log_m)
    _, terms_t, from_teacher = _compare(log_t, log_m)
    if of_s is not None:
        torch.mul(terms_s, 1.0 - beta, out=of_s)
    if of_t is not None:
        torch.mul(terms_t, beta, out=of_t)
    return beta * from_teacher + (1.0 - beta) * from_student


def _skew_kl(alpha: float, log_p: Tensor, log_q: Tensor, of_p: Tensor | None, of_q: Tensor | None) -> Tensor:
    """With r = p (1−α) q / m: d/dlog_p = p (log p − log m) + r, d/dlog_q = −r."""
    log_m = _log_mixture(log_p, log_q, alpha)
    p, terms, value = _compare(log_p, log_m)
    rest = (log_q - log_m).add_(math.log1p(-alpha)).exp_().masked_fill_(torch.isneginf(log_m), 0.0).mul_(p)
    if of_q is not None:
        torch.neg(rest, out=of_q)
    if of_p is not None:
        torch.add(terms, rest, out=of_p)
    return value


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """``log(weight · a + (1 − weight) · b)`` with 0 < weight < 1, [n, V] x2 -> [n, V]."""
    first = log_a + math.log(weight)
    return torch.logaddexp(first, log_b + math.log1p(-weight), out=first)


def _compare(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and p (log p − log q), [..., V] each, 0 where p > 0 = q, and KL(p ‖ q), [...], which is +inf there."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    value = terms.sum(-1)
    if needs_masks(value, log_p.shape[-1]):
        absent = torch.isneginf(log_p)
        unreachable = torch.isneginf(log_q) & ~absent
        value = terms.masked_fill_(absent, 0.0).masked_fill_(unreachable, math.inf).sum(-1)
        terms.masked_fill_(unreachable, 0.0)
        p.masked_fill_(unreachable, 0.0)
    return p, terms, value


class FiniteSums:
    """Whether all sums of `assuming_finite` were finite; kept on their device, and read once.

    Attributes:
        found: the sums, on their device.
    """

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    @property
    def failed(self) -> bool:
        """Whether one was not: the values and gradients are wrong without masks. Waits for the device."""
        return bool(self.found) and not bool(torch.cat(self.found).isfinite().all())


_ASSUMED: ContextVar[FiniteSums | None] = ContextVar("_ASSUMED", default=None)


@contextmanager
def assuming_finite() -> Iterator[FiniteSums]:
    """Within, a GPU makes no masks for probabilities of zero; the caller repeats without this where it ``failed``."""
    sums = FiniteSums()
    before = _ASSUMED.set(sums)
    try:
        yield sums
    finally:
        _ASSUMED.reset(before)


def needs_masks(value: Tensor, width: int) -> bool:
    """Whether sums [...] over so many columns need masks: only a probability of zero makes one NaN or infinite."""
    if value.device.type == "cpu":
        return not bool(value.isfinite().all())
    assumed = _ASSUMED.get()
    if assumed is None or width <= NARROW:
        return True
    assumed.found.append(value.detach())
    return False


class _ByRows(torch.autograd.Function):
    """Applies a function of rows to all rows, [..., V] x2 -> [...]."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, rows: Rows) -> Tensor:
        value = first.new_empty(first.shape[:-1])
        gradients = [
            torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
            for x, wanted in zip((first, second), ctx.needs_input_grad, strict=False)
        ]
        for values, *block in blocks(value, first, second, *gradients):
            values[:] = rows(*block)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # The gradient of a sum needs no further tensor [..., V]. A GPU would wait for the answer.
        plain = upstream.device.type == "cpu" and bool((upstream == 1.0).all())
        of_first, of_second = (x if x is None or plain else x * upstream[..., None] for x in ctx.saved_tensors)
        return of_first, of_second, None


def blocks(value: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Yield views of a few rows at a time: of ``value`` [...] and of tensors [..., m], the widest first, or None.

    On a CPU a block's results stay in the cache. On other devices there is one block.
    """
    count = value.numel()
    flat = [None if x is None else x.reshape(count, x.shape[-1]) for x in tensors]
    width = next(x.shape[-1] for x in flat if x is not None)
    step = max(1, BLOCK // max(1, width)) if value.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield tuple(None if x is None else x[start : start + step] for x in (value.view(-1), *flat))
