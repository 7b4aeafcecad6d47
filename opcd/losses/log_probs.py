"""Divergences as sums over log-probabilities, safe where a probability is zero: the arithmetic of every loss.

All of them read ``log_p, log_q: [..., V]`` in nats and return ``[...]`` in nats. The measures need not sum to one: the
same sums serve a whole vocabulary, k tokens of it, and k tokens with a bucket for the rest.
"""

import math

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
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v), [..., V] x2 -> [...] in nats, differentiable in both.

    A token with p = 0 adds 0, whatever q is. A token with p > 0 and q = 0 makes the value +inf; it then adds nothing to
    the gradient, so that a row which is clipped or masked away afterwards leaves no NaN behind.
    """
    absent = torch.isneginf(log_p)
    unreachable = torch.isneginf(log_q) & ~absent
    # Filled in place, before and after the product: autograd needs neither the difference before nor the terms after.
    difference = (log_p - log_q).masked_fill_(absent | unreachable, 0.0)
    return (log_p.exp() * difference).masked_fill_(unreachable, math.inf).sum(-1)


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
