"""Divergences as sums over log-probabilities, safe where a probability is zero: the arithmetic of every loss.

All of them read ``log_p, log_q: [..., V]`` in nats and return ``[...]`` in nats. The measures need not sum to one: the
same sums serve a whole vocabulary, k tokens of it, and k tokens with a bucket for the rest.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

NEVER = -math.inf
"""The log-probability of a token that cannot occur."""


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)``, [..., V] -> [..., V] in nats, in float32 (float64 stays float64)."""
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32, or as they are when they are float64."""
    return values if values.dtype == torch.float64 else values.float()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), [..., V] x2 -> [...] in nats, differentiable (once) in both.

    A token with p = 0 adds 0, whatever q is. A token with p > 0 and q = 0 makes the value +inf; it then adds nothing to
    the gradient, so that a row which is clipped or masked away afterwards leaves no NaN behind.
    """
    return _KL.apply(log_p, log_q)  # type: ignore[no-any-return, no-untyped-call]


class _KL(torch.autograd.Function):
    """The sum and its two gradients in as few passes over [..., V] as there can be, a few rows at a time.

    d/dlog_p = p (log p − log q + 1), d/dlog_q = −p. Autograd alone keeps and walks over twice as many tensors.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The values, and the gradients up to a factor a row."""
        value = log_p.new_empty(log_p.shape[:-1])
        first, second = _to_fill((log_p, log_q), ctx.needs_input_grad)
        for rows_p, rows_q, values, of_p, of_q in _blocks(log_p, log_q, value, first, second):
            p, terms, values[:] = _compare(rows_p, rows_q)
            if of_q is not None:
                of_q[:] = p
            if of_p is not None:
                torch.add(terms, p, out=of_p)
        ctx.save_for_backward(first, second)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of each input."""
        first, p = ctx.saved_tensors
        upstream = upstream[..., None]
        return (None if first is None else first * upstream), (None if p is None else p * -upstream)


BLOCK = 2**19
"""Numbers in the rows of one block on a CPU: what is computed from them stays in its cache."""


def _blocks(*tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Views of a few rows of all tensors at a time, [..., V] or [...] each; the first is [..., V]. None stays None."""
    first = tensors[0]
    assert first is not None
    width = max(1, first.shape[-1])
    flat = [None if x is None else x.reshape(-1, width) if x.dim() == first.dim() else x.reshape(-1) for x in tensors]
    count = first.numel() // width
    step = max(1, BLOCK // width) if first.device.type == "cpu" else max(1, count)
    for start in range(0, count, step):
        yield tuple(None if x is None else x[start : start + step] for x in flat)


def _to_fill(inputs: tuple[Tensor, Tensor], needed: tuple[bool, ...]) -> list[Tensor | None]:
    """Room for the gradient of each input that asks for one."""
    return [
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None
        for x, wanted in zip(inputs, needed, strict=False)
    ]


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


def entropy(log_p: Tensor) -> Tensor:
    """−Σ_v p_v log p_v, [..., V] -> [...] in nats, without gradient."""
    with torch.no_grad():
        value = -(log_p.exp().mul_(log_p)).sum(-1)
        if bool(value.isfinite().all()):
            return value
        return -(log_p.exp().mul_(log_p.masked_fill(torch.isneginf(log_p), 0.0))).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """``log(weight · a + (1 − weight) · b)`` with 0 < weight < 1, [..., V] x2 -> [..., V], differentiable once."""
    return _LogMixture.apply(log_a, log_b, weight)  # type: ignore[no-any-return, no-untyped-call]


class _LogMixture(torch.autograd.Function):
    """d/dlog_a = weight · a / m: a share of 1, and of 0 where neither can occur (autograd's is NaN there)."""

    @staticmethod
    def forward(ctx: Any, log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
        """The values, and what the gradient needs."""
        log_m = _log_mixture(log_a, log_b, weight)
        ctx.weight = weight
        wanted = zip((log_a, log_b), ctx.needs_input_grad, strict=False)
        ctx.save_for_backward(log_m, *(x if needed else None for x, needed in wanted))
        return log_m

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of each input."""
        log_m, *parts = ctx.saved_tensors
        shares = (math.log(ctx.weight), math.log1p(-ctx.weight))
        absent = torch.isneginf(log_m)
        first, second = (
            None if log_x is None else (log_x - log_m).add_(share).exp_().masked_fill_(absent, 0.0).mul_(upstream)
            for log_x, share in zip(parts, shares, strict=True)
        )
        return first, second, None


def _log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """The values of ``log_mixture`` alone, without gradient."""
    first = log_a + math.log(weight)
    return torch.logaddexp(first, log_b + math.log1p(-weight), out=first)


def log_total(log_p: Tensor) -> Tensor:
    """``log Σ_v p_v``, [..., V] -> [...]; ``NEVER`` with a zero gradient where every p is 0 or there is no token."""
    if log_p.shape[-1] == 0:
        return log_p.new_full(log_p.shape[:-1], NEVER)
    empty = torch.isneginf(log_p).all(-1)
    return log_p.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, NEVER)


def jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float) -> Tensor:
    """β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m) with m = β·teacher + (1−β)·student, differentiable once."""
    return _JSD.apply(student_log_probs, teacher_log_probs, beta)  # type: ignore[no-any-return, no-untyped-call]


class _JSD(torch.autograd.Function):
    """d/dlog_s = (1−β) s (log s − log m), d/dlog_t = β t (log t − log m): what comes through m cancels."""

    @staticmethod
    def forward(ctx: Any, log_s: Tensor, log_t: Tensor, beta: float) -> Tensor:
        """The values, and the gradients up to a factor a row."""
        ctx.beta, value = beta, log_s.new_empty(log_s.shape[:-1])
        first, second = _to_fill((log_s, log_t), ctx.needs_input_grad)
        for rows_s, rows_t, values, of_s, of_t in _blocks(log_s, log_t, value, first, second):
            log_m = _log_mixture(rows_t, rows_s, beta)
            _, terms_s, from_student = _compare(rows_s, log_m)
            _, terms_t, from_teacher = _compare(rows_t, log_m)
            values[:] = beta * from_teacher + (1.0 - beta) * from_student
            for of_x, terms in ((of_s, terms_s), (of_t, terms_t)):
                if of_x is not None:
                    of_x[:] = terms
        ctx.save_for_backward(first, second)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """The gradient of each input."""
        kept = zip(ctx.saved_tensors, (1.0 - ctx.beta, ctx.beta), strict=True)
        first, second = (None if terms is None else terms * (share * upstream[..., None]) for terms, share in kept)
        return first, second, None


def skew_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float) -> Tensor:
    """KL(teacher ‖ α·teacher + (1−α)·student)."""
    return kl(teacher_log_probs, log_mixture(teacher_log_probs, student_log_probs, alpha))


def skew_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float) -> Tensor:
    """KL(student ‖ α·student + (1−α)·teacher)."""
    return kl(student_log_probs, log_mixture(student_log_probs, teacher_log_probs, alpha))
