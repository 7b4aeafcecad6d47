"""The divergences, one small class each: a class holds its options for YAML and stops the gradient at the teacher.

To add one, write a subclass of ``Divergence`` with ``from_log_probs``. p_S is the student's distribution, p_T the
teacher's.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from opcd.losses import _kernels as kernels
from opcd.losses.functional import check_alpha, check_beta, check_logits
from opcd.losses.log_probs import check_positive, log_probs

Known = Literal["distribution", "topk", "token"]
"""What is known of a teacher at a position: the whole distribution, its k likeliest tokens, or the sampled token."""


class Loss(ABC):
    """A comparison of student and teacher at every response token.

    Attributes:
        on_policy: whether the tokens must be samples from the student's own distribution.
    """

    on_policy: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> Known:
        """The least that must be known of the teacher at a position; the whole distribution serves every loss."""

    @abstractmethod
    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`divergence` in nats, with gradient to the student, and statistics of the loss without gradient: [n] each.

        Computed from both log-probabilities [n, V] and the sampled tokens [n].
        """

    def values_of_record(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The same as `values`, from the student's log-probabilities [n, V] and a record of the teacher's.

        The record is tokens [n, k] or [n] with the teacher's log p of each.

        Raises:
            ValueError: this loss needs the whole distribution.
        """
        raise ValueError(f"{self!r} needs the teacher's whole distribution")

    def check_record(self, recorded: int) -> None:
        """Raise ``ValueError`` unless `values_of_record` works with so many tokens a position (0: the sampled one)."""
        raise ValueError(
            f"{self!r} needs the teacher's whole distribution; with a few tokens a position use TopK(..., "
            "support='teacher') or SampledReverseKL"
        )


class Divergence(Loss):
    """A divergence of the student's next-token distribution from the teacher's, per position and in nats."""

    @property
    def needs(self) -> Known:
        """The whole distribution."""
        return "distribution"

    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The divergence, without further statistics."""
        return {"divergence": self.from_log_probs(student, teacher)}

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """D(softmax(student_logits / temperature), softmax(teacher_logits / temperature)).

        Logits [..., V] x2 -> [...] in nats, in float32 (float64 stays float64), with gradient to the student's logits
        only.

        Raises:
            ValueError: logits of two shapes or devices, or not floating point, or a temperature that is not positive.
        """
        check_positive(temperature, "temperature")
        check_logits(student_logits, teacher_logits)
        student = log_probs(student_logits, temperature)
        return self.from_log_probs(student, log_probs(teacher_logits.detach(), temperature))

    @abstractmethod
    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The divergence from log-probabilities, [..., V] x2 -> [...]; a token with -inf in both must add nothing."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({options})"


class ForwardKL(Divergence):
    """KL(p_T ‖ p_S) = Σ_v p_T (log p_T − log p_S), teacher to student: covers the teacher's modes."""

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return kernels.kl(teacher_log_probs, student_log_probs)


class ReverseKL(Divergence):
    """KL(p_S ‖ p_T) = Σ_v p_S (log p_S − log p_T), student to teacher: seeks the teacher's modes; the loss of OPCD."""

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return kernels.kl(student_log_probs, teacher_log_probs)


class JSD(Divergence):
    """β·KL(p_T ‖ m) + (1−β)·KL(p_S ‖ m) with m = β·p_T + (1−β)·p_S (GKD's convention, arXiv:2306.13649).

    Args:
        beta: the teacher's share of the mixture m and of the loss, 0 < beta < 1.

    Raises:
        ValueError: beta is not between 0 and 1; at 0 and 1 the message names the KL to use instead.
    """

    def __init__(self, beta: float = 0.5) -> None:
        check_beta(beta)
        self.beta = beta

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return kernels.jsd(student_log_probs, teacher_log_probs, self.beta)


class SkewKL(Divergence):
    """KL(p_T ‖ α·p_T + (1−α)·p_S) (DistiLLM, arXiv:2402.03898): a forward KL that is at most −log α.

    Args:
        alpha: the teacher's share of the mixture, 0 < alpha < 1.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        check_alpha(alpha, "ForwardKL")
        self.alpha = alpha

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return kernels.skew_kl(teacher_log_probs, student_log_probs, self.alpha)


class SkewReverseKL(Divergence):
    """KL(p_S ‖ (1−α)·p_T + α·p_S) (DistiLLM, arXiv:2402.03898): a reverse KL that is at most −log α.

    Args:
        alpha: the student's share of the mixture, 0 < alpha < 1.

    Raises:
        ValueError: alpha is not between 0 and 1.
    """

    def __init__(self, alpha: float = 0.1) -> None:
        check_alpha(alpha, "ReverseKL")
        self.alpha = alpha

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        return kernels.skew_kl(student_log_probs, teacher_log_probs, self.alpha)


class Mixture(Divergence):
    """Σ_i weight_i · D_i: several divergences of the same two distributions, such as forward and reverse KL.

    Args:
        divergences: two or more.
        weights: one positive weight for each divergence, in the same order; they need not sum to 1.

    Raises:
        ValueError: fewer than two divergences, another number of weights, or a weight that is not positive.
    """

    def __init__(self, divergences: list[Divergence], weights: list[float]) -> None:
        if len(divergences) < 2 or len(divergences) != len(weights):
            raise ValueError(
                f"a Mixture needs two or more divergences and as many weights, got {len(divergences)} and "
                f"{len(weights)}; use a single divergence alone"
            )
        for weight in weights:
            check_positive(weight, "a weight of the Mixture")
        self.divergences = divergences
        self.weights = weights

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        first, *rest = (
            weight * divergence.from_log_probs(student_log_probs, teacher_log_probs)
            for weight, divergence in zip(self.weights, self.divergences, strict=True)
        )
        return sum(rest, first)
