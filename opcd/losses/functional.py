"""Pure functions of logits, unreduced: ``[..., V] x2 -> [...]`` in nats, computed in float32 (float64 stays float64).

p_S = softmax(student_logits) and p_T = softmax(teacher_logits). Both arguments get a gradient; the classes in
``divergences.py`` stop the teacher's. All functions raise ``ValueError`` for logits of two shapes or devices, or that
are not floating point. A logit of -inf is a token of probability zero: it adds 0 where p = 0, and KL(p ‖ q) is +inf
with a finite gradient where p > 0 and q = 0.
"""

import torch
from torch import Tensor

from opcd.losses import _kernels as kernels
from opcd.losses import log_probs as measure
from opcd.losses.log_probs import check_device, check_floating, check_positive, log_probs


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p_T ‖ p_S) = Σ_v p_T (log p_T − log p_S), [..., V] x2 -> [...] in nats; covers the teacher's modes.

    The value includes the teacher's entropy: unlike a cross-entropy, it is zero exactly where the two models agree.
    """
    check_logits(student_logits, teacher_logits)
    return kernels.kl(log_probs(teacher_logits), log_probs(student_logits))


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(p_S ‖ p_T) = Σ_v p_S (log p_S − log p_T), [..., V] x2 -> [...] in nats; seeks the teacher's modes."""
    check_logits(student_logits, teacher_logits)
    return kernels.kl(log_probs(student_logits), log_probs(teacher_logits))


def jsd(student_logits: Tensor, teacher_logits: Tensor, beta: float = 0.5) -> Tensor:
    """β·KL(p_T ‖ m) + (1−β)·KL(p_S ‖ m), m = β·p_T + (1−β)·p_S, [..., V] x2 -> [...] in nats, 0 < beta < 1.

    GKD's convention (arXiv:2306.13649). The value is between 0 and −β log β − (1−β) log(1−β), so always finite.
    ``ValueError`` at beta = 0 and 1, where the value is zero for every pair of models.
    """
    check_beta(beta)
    check_logits(student_logits, teacher_logits)
    return kernels.jsd(log_probs(student_logits), log_probs(teacher_logits), beta)


def skew_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p_T ‖ α·p_T + (1−α)·p_S), [..., V] x2 -> [...] in nats, 0 < alpha < 1 (DistiLLM, arXiv:2402.03898).

    The value is between 0 and −log α, so finite where p_S = 0 < p_T.
    """
    check_alpha(alpha, "ForwardKL")
    check_logits(student_logits, teacher_logits)
    return kernels.skew_kl(log_probs(teacher_logits), log_probs(student_logits), alpha)


def skew_reverse_kl(student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p_S ‖ (1−α)·p_T + α·p_S), [..., V] x2 -> [...] in nats, 0 < alpha < 1 (DistiLLM, arXiv:2402.03898).

    The value is between 0 and −log α, so finite where p_T = 0 < p_S.
    """
    check_alpha(alpha, "ReverseKL")
    check_logits(student_logits, teacher_logits)
    return kernels.skew_kl(log_probs(student_logits), log_probs(teacher_logits), alpha)


def clip_nats(values: Tensor, max_nats: float) -> Tensor:
    """min(values, max_nats) per token, [...] -> [...] in nats; a clipped token (+inf included) has a zero gradient.

    Clip whole tokens only: single terms of a token's sum can be negative, and clipping them breaks the divergence.
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
    """1.0 where both models have the same likeliest token, else 0.0, [..., V] x2 -> [...] in float32, no gradient."""
    check_logits(student_logits, teacher_logits)
    return (student_logits.argmax(-1) == teacher_logits.argmax(-1)).float()


def retained_mass(logits: Tensor, tokens: Tensor) -> Tensor:
    """Σ_{v ∈ tokens} softmax(logits)_v, [..., V] and token ids [..., n] -> [...] in 0..1, without gradient.

    The ids of one row must differ: a repeated one is counted twice.
    """
    check_floating(logits, "logits")
    with torch.no_grad():
        return log_probs(logits).gather(-1, tokens).exp().sum(-1)


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Raise ``ValueError`` for logits that are not floating point, or not of one shape and one device."""
    check_floating(student_logits, "student_logits")
    check_floating(teacher_logits, "teacher_logits")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ValueError(
            f"student_logits are {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)}; "
            "both must be one shape [..., V]: score the same response tokens with both models, and cut a padded "
            "vocabulary to the shorter one"
        )
    check_device(student_logits, "student_logits", teacher_logits, "teacher_logits")


def check_beta(beta: float) -> None:
    """Raise ``ValueError`` unless 0 < beta < 1, with the KL to use at the two ends."""
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta is {beta!r}; JSD needs 0 < beta < 1, because at both ends it is zero for every pair of models. "
            "Use ForwardKL for KL(teacher ‖ student) (what JSD/beta tends to as beta goes to 0), or ReverseKL for "
            "KL(student ‖ teacher) (JSD/(1-beta) as beta goes to 1)"
        )


def check_alpha(alpha: float, unskewed: str) -> None:
    """Raise ``ValueError`` unless 0 < alpha < 1, with the name of the KL at alpha = 0."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha is {alpha!r}; a skewed KL needs 0 < alpha < 1: it is zero at 1, and {unskewed} (use that) at 0"
        )
