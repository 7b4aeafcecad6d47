"""Pure functions of logits, unreduced: ``[..., V] x2 -> [...]`` in nats, computed in float32 (float64 stays float64).

p_S = softmax(student_logits) and p_T = softmax(teacher_logits). Being pure, the divergences pass a gradient to both
arguments; the classes in ``divergences.py`` stop the teacher's. All raise ``ValueError`` for logits of two shapes or
devices, or that are not floating point. A logit of -inf is a token of probability zero: it adds 0 where p = 0, and
KL(p ‖ q) is +inf where p > 0 and q = 0, as it is by definition, with a finite gradient.
"""

import torch
from torch import Tensor

from opcd.losses import _kernels as kernels
from opcd.losses import log_probs as measure
from opcd.losses._validation import check_alpha, check_beta, check_floating, check_logits, check_positive
from opcd.losses.log_probs import log_probs


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p_T ‖ p_S) = Σ_v p_T (log p_T − log p_S), [..., V] x2 -> [...] in nats; covers the teacher's modes.

    A true KL, with the teacher's entropy: zero exactly where the two models agree (a cross-entropy is not).
    """
    check_logits(student_logits, teacher_logits)
    return kernels.kl(log_probs(teacher_logits), log_probs(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p_S ‖ p_T) = Σ_v p_S (log p_S − log p_T), [..., V] x2 -> [...] in nats; seeks the teacher's modes."""
    check_logits(student_logits, teacher_logits)
    return kernels.kl(log_probs(student_logits), log_probs(teacher_logits))


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """β·KL(p_T ‖ m) + (1−β)·KL(p_S ‖ m), m = β·p_T + (1−β)·p_S, [..., V] x2 -> [...] in nats, 0 < beta < 1.

    GKD's convention (arXiv:2306.13649). Between 0 and −β log β − (1−β) log(1−β), so finite for any pair of models.
    ``ValueError`` at beta = 0 and 1, where it vanishes for every pair.
    """
    check_beta(beta)
    check_logits(student_logits, teacher_logits)
    return kernels.jsd(log_probs(student_logits), log_probs(teacher_logits), beta)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p_T ‖ α·p_T + (1−α)·p_S), [..., V] x2 -> [...] in nats, 0 < alpha < 1 (DistiLLM, arXiv:2402.03898).

    Between 0 and −log α, so finite where the student gives a token of the teacher no probability.
    """
    check_alpha(alpha, "ForwardKL")
    check_logits(student_logits, teacher_logits)
    return kernels.skew_kl(log_probs(teacher_logits), log_probs(student_logits), alpha)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p_S ‖ (1−α)·p_T + α·p_S), [..., V] x2 -> [...] in nats, 0 < alpha < 1 (DistiLLM, arXiv:2402.03898).

    Between 0 and −log α, so finite where the teacher gives a token of the student no probability.
    """
    check_alpha(alpha, "ReverseKL")
    check_logits(student_logits, teacher_logits)
    return kernels.skew_kl(log_probs(student_logits), log_probs(teacher_logits), alpha)


def clip_nats(values: Tensor, max_nats: float) -> Tensor:
    """min(values, max_nats) per token, [...] -> [...] in nats; a clipped token (+inf included) has a zero gradient.

    For whole tokens only: the terms of one token's sum can be negative, and clipping those turns a divergence around.
    ``ValueError`` unless max_nats is positive and finite.
    """
    check_positive(max_nats, "max_nats")
    return values.clamp(max=max_nats)


def entropy(logits: Tensor) -> Tensor:
    """−Σ_v p log p with p = softmax(logits), [..., V] -> [...] in nats, without gradient."""
    check_floating(logits, "logits")
    with torch.no_grad():
        return measure.entropy(log_probs(logits))


def top1_agreement(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """1.0 where both models find the same token likeliest, else 0.0, [..., V] x2 -> [...] in float32, no gradient."""
    check_logits(student_logits, teacher_logits)
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


def retained_mass(logits: Tensor, tokens: Tensor) -> Tensor:
    """Σ_{v ∈ tokens} softmax(logits)_v, [..., V] and token ids [..., n] -> [...] in 0..1, without gradient.

    The ids of one row must differ: a repeated one is counted twice.
    """
    check_floating(logits, "logits")
    with torch.no_grad():
        return log_probs(logits).gather(-1, tokens).exp().sum(-1)
