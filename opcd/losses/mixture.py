"""A weighted sum of divergences."""

from torch import Tensor

from opcd.losses._validation import check_positive
from opcd.losses.divergences import Divergence


class Mixture(Divergence):
    """Σ_i weight_i · D_i: several divergences of the same two distributions at once, such as forward and reverse KL."""

    def __init__(self, divergences: list[Divergence], weights: list[float]) -> None:
        """Hold the terms.

        Args:
            divergences: at least two.
            weights: one positive weight a divergence, in the same order; they need not sum to 1.

        Raises:
            ValueError: for fewer than two divergences, another number of weights, or one that is not positive.
        """
        if len(divergences) < 2 or len(divergences) != len(weights):
            raise ValueError(
                f"a Mixture wants two or more divergences and as many weights, got {len(divergences)} and "
                f"{len(weights)}; use a single divergence alone"
            )
        for weight in weights:
            check_positive(weight, "a weight of the Mixture")
        self.divergences = divergences
        self.weights = weights

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The weighted sum, [..., V] x2 -> [...]."""
        first, *rest = (
            weight * divergence.from_log_probs(student_log_probs, teacher_log_probs)
            for weight, divergence in zip(self.weights, self.divergences, strict=True)
        )
        return sum(rest, first)
