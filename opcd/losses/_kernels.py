"""Divergences as sums over two models' log-probabilities, with their gradient in as few passes as there can be.

All of them read ``log_p, log_q: [..., V]`` in nats, give ``[...]`` in nats, and are differentiable (once) in both. A
token that neither can produce adds 0. The gradient is computed with the value, a few rows at a time, up to the factor
of each row: autograd alone keeps and walks over more than twice as many tensors [..., V].
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**18
"""Numbers in the rows of one block on a CPU. With 2**19 glibc's heap keeps 50 MiB more."""


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), [..., V] x2 -> [...] in nats.

    A token with p = 0 adds 0, whatever q is. A token with p > 0 and q = 0 makes the value +inf; it then adds nothing to
    the gradient, so that a row which is clipped or masked away afterwards leaves no NaN behind.
    """
    return _by_rows(_kl, log_p, log_q)


def jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float) -> Tensor:
    """β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m) with m = β·teacher + (1−β)·student, [..., V] x2 -> [...] in nats."""
    return _by_rows(partial(_jsd, beta), student_log_probs, teacher_log_probs)


def skew_kl(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """KL(p ‖ α·p + (1−α)·q), [..., V] x2 -> [...] in nats."""
    return _by_rows(partial(_skew_kl, alpha), log_p, log_q)


Rows = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""A few rows of both, and room [n, V] for the gradient of each where it is asked for -> the values [n]."""


def _kl(log_p: Tensor, log_q: Tensor, of_p: Tensor | None, of_q: Tensor | None) -> Tensor:
    """d/dlog_p = p (log p − log q + 1), d/dlog_q = −p."""
    p, terms, value = _compare(log_p, log_q)
    if of_q is not None:
        torch.neg(p, out=of_q)
    if of_p is not None:
        torch.add(terms, p, out=of_p)
    return value


def _jsd(beta: float, log_s: Tensor, log_t: Tensor, of_s: Tensor | None, of_t: Tensor | None) -> Tensor:
    """d/dlog_s = (1−β) s (log s − log m), d/dlog_t = β t (log t − log m): what comes through m cancels."""
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
    """p, p (log p − log q), [..., V] each, and KL(p ‖ q), [...]; both are 0 where p > 0 = q, where the KL is +inf."""
    p = log_p.exp()
    terms = (log_p - log_q).mul_(p)
    value = terms.sum(-1)
    # Only a probability of zero makes the quick sum NaN or infinite; few rows have one, so the masks can wait.
    if not bool(value.isfinite().all()):
        absent = torch.isneginf(log_p)
        unreachable = torch.isneginf(log_q) & ~absent
        value = terms.masked_fill_(absent, 0.0).masked_fill_(unreachable, math.inf).sum(-1)
        terms.masked_fill_(unreachable, 0.0)
        p.masked_fill_(unreachable, 0.0)
    return p, terms, value


def _by_rows(rows: Rows, first: Tensor, second: Tensor) -> Tensor:
    """A function of rows over all of them, [..., V] x2 -> [...], with its gradient."""
    return _ByRows.apply(first, second, rows)  # type: ignore[no-any-return, no-untyped-call]


class _ByRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor, rows: Rows) -> Tensor:
        """The values, and the gradients up to a factor a row."""
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
        """The gradient of each input."""
        plain = bool((upstream == 1.0).all())  # a sum: no further tensor [..., V]
        of_first, of_second = (x if x is None or plain else x * upstream[..., None] for x in ctx.saved_tensors)
        return of_first, of_second, None


def blocks(value: Tensor, *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of a few rows at a time, of [...] and of tensors [..., m], the widest of them first. None stays None.

    On a CPU what is computed from a block stays in its cache, and needs no memory of the size of the whole.
    """
    count = value.numel()
    flat = [None if x is None else x.reshape(count, x.shape[-1]) for x in tensors]
    width = next(x.shape[-1] for x in flat if x is not None)
    step = max(1, BLOCK // max(1, width)) if value.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield tuple(None if x is None else x[start : start + step] for x in (value.view(-1), *flat))
