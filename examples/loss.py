"""A loss in one file: the Rényi divergence.

    opcd fit --config configs/quickstart.yaml \\
        --model.loss examples.loss.Renyi --model.loss.init_args.alpha 0.5
"""

from torch import Tensor

from opcd.losses import Divergence


class Renyi(Divergence):
    """1 / (α − 1) · log Σ_v p_T^α p_S^(1−α): at most KL(p_T ‖ p_S), and that KL as α goes to 1.

    Args:
        alpha: the order, 0 < alpha < 1.
    """

    def __init__(self, alpha: float = 0.5) -> None:
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha is {alpha!r}; Renyi needs 0 < alpha < 1, and is ForwardKL (use that) at 1")
        self.alpha = alpha

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """D_α(teacher ‖ student), [..., V] x2 -> [...]."""
        powers = self.alpha * teacher_log_probs + (1.0 - self.alpha) * student_log_probs
        return powers.logsumexp(-1) / (self.alpha - 1.0)
