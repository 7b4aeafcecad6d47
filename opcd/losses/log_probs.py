"""Divergences as sums over log-probabilities, safe where a probability is zero: the arithmetic of every loss.

All of them read ``log_p, log_q: [..., V]`` in nats and return ``[...]`` in nats. The measures need not sum to one: the
same sums serve a whole vocabulary, k tokens of it, and k tokens with a bucket for the rest.
"""

import math
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
    """The sum and its two gradients in as few passes over [..., V] as there can be, in place where nobody looks.

    d/dlog_p = p (log p − log q + 1), d/dlog_q = −p. Autograd alone keeps and walks over twice as many tensors.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, log_q: Tensor) -> Tensor:
        """The values, and what the gradient needs."""
        difference = log_p - log_q
        value = (difference * log_p.exp()).sum(-1)
        # Only a probability of zero makes the quick sum NaN or infinite; few rows have one, so the masks can wait.
        ctx.masked = not bool(value.isfinite().all())
        if ctx.masked:
            absent, unreachable = _zeros(log_p, log_q)
            terms = difference.masked_fill_(absent | unreachable, 0.0).mul_(log_p.exp())
            value = terms.masked_fill_(unreachable, math.inf).sum(-1)
        ctx.save_for_backward(log_p, log_q)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of each input."""
        log_p, log_q = ctx.saved_tensors
        weighted = log_p.exp().mul_(upstream[..., None])
        if ctx.masked:
            absent, unreachable = _zeros(log_p, log_q)
            weighted.masked_fill_(unreachable, 0.0)
        first = second = None
        if ctx.needs_input_grad[0]:
            difference = log_p - log_q
            if ctx.masked:
                difference.masked_fill_(absent | unreachable, 0.0)
            first = difference.add_(1.0).mul_(weighted)
        if ctx.needs_input_grad[1]:
            second = weighted.neg_()
        return first, second


def _zeros(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(p = 0, p > 0 = q), each [..., V]."""
    absent = torch.isneginf(log_p)
    return absent, torch.isneginf(log_q) & ~absent


def entropy(log_p: Tensor) -> Tensor:
    """−Σ_v p_v log p_v, [..., V] -> [...] in nats, without gradient."""
    with torch.no_grad():
        value = -(log_p.exp().mul_(log_p)).sum(-1)
        if bool(value.isfinite().all()):
            return value
        return -(log_p.exp().mul_(log_p.masked_fill(torch.isneginf(log_p), 0.0))).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, weight: float) -> Tensor:
    """``log(weight · a + (1 − weight) · b)`` with 0 < weight < 1, [..., V] x2 -> [..., V]."""
    absent = torch.isneginf(log_a) & torch.isneginf(log_b)
    # The gradient of logaddexp at two infinities is NaN, so it never sees them.
    log_a = log_a.masked_fill(absent, 0.0)
    return torch.logaddexp(log_a + math.log(weight), log_b + math.log1p(-weight)).masked_fill(absent, NEVER)


def log_total(log_p: Tensor) -> Tensor:
    """``log Σ_v p_v``, [..., V] -> [...]; ``NEVER`` with a zero gradient where every p is 0 or there is no token."""
    if log_p.shape[-1] == 0:
        return log_p.new_full(log_p.shape[:-1], NEVER)
    empty = torch.isneginf(log_p).all(-1)
    return log_p.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, NEVER)


def jsd(student_log_probs: Tensor, teacher_log_probs: Tensor, beta: float) -> Tensor:
    """β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m) with m = β·teacher + (1−β)·student."""
    mixture = log_mixture(teacher_log_probs, student_log_probs, beta)
    return beta * kl(teacher_log_probs, mixture) + (1.0 - beta) * kl(student_log_probs, mixture)


def skew_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float) -> Tensor:
    """KL(teacher ‖ α·teacher + (1−α)·student)."""
    return kl(teacher_log_probs, log_mixture(teacher_log_probs, student_log_probs, alpha))


def skew_reverse_kl(student_log_probs: Tensor, teacher_log_probs: Tensor, alpha: float) -> Tensor:
    """KL(student ‖ α·student + (1−α)·teacher)."""
    return kl(student_log_probs, log_mixture(student_log_probs, teacher_log_probs, alpha))
