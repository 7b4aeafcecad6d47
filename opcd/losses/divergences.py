"""One small class a divergence: it holds the knobs for YAML, and stops the gradient at the teacher.

Adding one is a subclass of ``Divergence`` that implements ``from_log_probs``.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from opcd.losses import _kernels as kernels
from opcd.losses._validation import check_alpha, check_beta, check_logits, check_positive
from opcd.losses.log_probs import log_probs

Known = Literal["distribution", "topk", "token"]
"""What is known of a teacher at a position: all of it, its likeliest tokens, or the sampled token alone."""


class Loss(ABC):
    """What is compared at every response token.

    Attributes:
        on_policy: whether the tokens must be draws from the student's own distribution.
    """

    on_policy: ClassVar[bool] = False

    @property
    @abstractmethod
    def needs(self) -> Known:
        """The least that must be known of the teacher at a position; the whole distribution serves every loss."""

    @abstractmethod
    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """`divergence` in nats, with gradient to the student, and statistics of the loss without: [n] each.

        From both log-probabilities [n, V] and the sampled tokens [n].
        """

    def values_of_record(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The same from log-probabilities [n, V] of the student, and tokens [n, k] or [n] with the teacher's log p.

        Raises:
            ValueError: this loss needs the whole distribution.
        """
        raise ValueError(f"{self!r} needs the teacher's whole distribution")

    def check_record(self, recorded: int) -> None:
        """``ValueError`` unless `values_of_record` can work with that many tokens a position (0: the sampled one)."""
        raise ValueError(
            f"{self!r} needs the teacher's whole distribution; of a few tokens a position, TopK(..., "
            "support='teacher') or SampledReverseKL can be had"
        )


class Divergence(Loss):
    """How far the student's next-token distribution is from the teacher's, per position and in nats."""

    @property
    def needs(self) -> Known:
        """The whole distribution."""
        return "distribution"

    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The divergence, and nothing beside it."""
        return {"divergence": self.from_log_probs(student, teacher)}

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, *, temperature: float = 1.0) -> Tensor:
        """D(softmax(student_logits / temperature), softmax(teacher_logits / temperature)).

        Logits [..., V] x2 -> [...] nats in float32 (float64 stays float64), gradient to the student's logits alone.
        ``ValueError`` for logits of two shapes or devices, or not floating point, and for a temperature that is not
        positive.
        """
        check_positive(temperature, "temperature")
        check_logits(student_logits, teacher_logits)
        student = log_probs(student_logits, temperature)
        return self.from_log_probs(student, log_probs(teacher_logits.detach(), temperature))

    @abstractmethod
    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The same from log-probabilities, [..., V] x2 -> [...]; an outcome that is -inf in both must add nothing."""

    def __repr__(self) -> str:
        knobs = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({knobs})"


class ForwardKL(Divergence):
    """KL(p_T ‖ p_S) = Σ_v p_T (log p_T − log p_S): covers the teacher's modes; zero exactly at equality."""

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """KL(teacher ‖ student), [..., V] x2 -> [...]."""
        return kernels.kl(teacher_log_probs, student_log_probs)


class ReverseKL(Divergence):
    """KL(p_S ‖ p_T) = Σ_v p_S (log p_S − log p_T): seeks the teacher's modes; the loss of OPCD."""

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """KL(student ‖ teacher), [..., V] x2 -> [...]."""
        return kernels.kl(student_log_probs, teacher_log_probs)


class JSD(Divergence):
    """β·KL(p_T ‖ m) + (1−β)·KL(p_S ‖ m) with m = β·p_T + (1−β)·p_S (GKD's convention, arXiv:2306.13649)."""

    def __init__(self, beta: float = 0.5) -> None:
        """Hold the weight.

        Args:
            beta: the teacher's share of the mixture m and of the loss, 0 < beta < 1.

        Raises:
            ValueError: at beta = 0 and 1, naming the KL to use instead, and outside of them.
        """
        check_beta(beta)
        self.beta = beta

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """β·KL(teacher ‖ m) + (1−β)·KL(student ‖ m), [..., V] x2 -> [...]."""
        return kernels.jsd(student_log_probs, teacher_log_probs, self.beta)


class SkewKL(Divergence):
    """KL(p_T ‖ α·p_T + (1−α)·p_S) (DistiLLM, arXiv:2402.03898): a forward KL that is at most −log α."""

    def __init__(self, alpha: float = 0.1) -> None:
        """Hold the skew.

        Args:
            alpha: the teacher's share of the mixture, 0 < alpha < 1.

        Raises:
            ValueError: outside of 0 < alpha < 1.
        """
        check_alpha(alpha, "ForwardKL")
        self.alpha = alpha

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """KL(teacher ‖ α·teacher + (1−α)·student), [..., V] x2 -> [...]."""
        return kernels.skew_kl(teacher_log_probs, student_log_probs, self.alpha)


class SkewReverseKL(Divergence):
    """KL(p_S ‖ (1−α)·p_T + α·p_S) (DistiLLM, arXiv:2402.03898): a reverse KL that is at most −log α."""

    def __init__(self, alpha: float = 0.1) -> None:
        """Hold the skew.

        Args:
            alpha: the student's share of the mixture, 0 < alpha < 1.

        Raises:
            ValueError: outside of 0 < alpha < 1.
        """
        check_alpha(alpha, "ReverseKL")
        self.alpha = alpha

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """KL(student ‖ (1−α)·teacher + α·student), [..., V] x2 -> [...]."""
        return kernels.skew_kl(student_log_probs, teacher_log_probs, self.alpha)
