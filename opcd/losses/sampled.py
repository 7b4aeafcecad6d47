"""The reverse KL from the sampled tokens only, for teachers that give one log-probability per token."""

from typing import ClassVar

import torch
from torch import Tensor

from opcd.losses.divergences import Known, Loss
from opcd.losses.log_probs import check_device, check_floating, check_positive


def sampled_reverse_kl(
    student_log_probs: Tensor,
    teacher_log_probs: Tensor,
    rollout_log_probs: Tensor | None = None,
    importance_clip: float | None = None,
) -> Tensor:
    """ρ (log p_S(y) − log p_T(y)) of sampled tokens y ~ p_S, [...] x2 -> [...] in nats: KL(p_S ‖ p_T) in expectation.

    The gradient is that of a policy-gradient step with the advantage A = log p_T(y) − log p_S(y) of each token:
    −ρ A ∇ log p_S(y). Its expectation is the gradient of KL(p_S ‖ p_T) at the position. (The derivative of the value
    itself, ∇ log p_S(y), has expectation zero.) The teacher gets no gradient.

    Args:
        student_log_probs: log p_S(y), [...] in nats, with gradient.
        teacher_log_probs: log p_T(y), [...] in nats.
        rollout_log_probs: log p_B(y), [...] in nats, of the policy that sampled y, if that is not the student of this
            step (stale or low-precision weights, another temperature): ρ = p_S(y) / p_B(y), without gradient. None:
            ρ = 1.
        importance_clip: clips ρ from above (truncated importance sampling), which trades variance for bias.

    Raises:
        ValueError: shapes or devices differ, values are not floating point, importance_clip is not positive, or it is
            given without rollout_log_probs, where it has no effect.
    """
    _check(student_log_probs, teacher_log_probs, "teacher_log_probs")
    student, ratio = student_log_probs, torch.ones_like(student_log_probs)
    if rollout_log_probs is not None:
        _check(student_log_probs, rollout_log_probs, "rollout_log_probs")
        ratio = (student.detach() - rollout_log_probs.detach()).exp()
    if importance_clip is not None:
        check_positive(importance_clip, "importance_clip")
        if rollout_log_probs is None:
            raise ValueError(
                "importance_clip has no effect without rollout_log_probs: the importance weights are 1; give the "
                "log-probabilities of the policy that sampled the tokens, or leave it None"
            )
        ratio = ratio.clamp(max=importance_clip)
    value = ratio * (student - teacher_log_probs).detach()
    return value + value * (student - student.detach())


class SampledReverseKL(Loss):
    """KL(p_S ‖ p_T), student to teacher, estimated on the sampled tokens: a policy gradient with a per-token advantage.

    With the teacher's whole distribution, ``ReverseKL`` has the same expected gradient and no variance.

    Args:
        importance_clip: clips the importance weights p_S / p_rollout from above. None: no clipping.

    Raises:
        ValueError: importance_clip is not positive.
    """

    on_policy: ClassVar[bool] = True

    def __init__(self, importance_clip: float | None = None) -> None:
        if importance_clip is not None:
            check_positive(importance_clip, "importance_clip")
        self.importance_clip = importance_clip

    def __call__(
        self, student_log_probs: Tensor, teacher_log_probs: Tensor, rollout_log_probs: Tensor | None = None
    ) -> Tensor:
        """``sampled_reverse_kl`` of log p(y) of the sampled tokens, [...] x2 or x3 -> [...] in nats; same errors."""
        return sampled_reverse_kl(student_log_probs, teacher_log_probs, rollout_log_probs, self.importance_clip)

    @property
    def needs(self) -> Known:
        """The log-probability of the sampled token."""
        return "token"

    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The estimate, from the sampled tokens' log-probabilities in both distributions."""
        return {"divergence": self(*(log_p.gather(-1, tokens[:, None])[:, 0] for log_p in (student, teacher)))}

    def values_of_record(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The estimate, from the sampled tokens [n] and log p_T of them."""
        return {"divergence": self(student.gather(-1, tokens[:, None])[:, 0], log_probs)}

    def check_record(self, recorded: int) -> None:
        """Accept any record: each holds the sampled token."""

    def __repr__(self) -> str:
        return f"SampledReverseKL(importance_clip={self.importance_clip!r})"


def _check(student: Tensor, other: Tensor, name: str) -> None:
    check_floating(student, "student_log_probs")
    check_floating(other, name)
    if student.shape != other.shape:
        raise ValueError(
            f"student_log_probs are {list(student.shape)} and {name} {list(other.shape)}; both must hold one value a "
            "sampled token: log_probs.gather(-1, tokens[..., None])[..., 0]"
        )
    check_device(student, "student_log_probs", other, name)
