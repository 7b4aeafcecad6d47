"""What every loss asks of its arguments, each refusal with what was given and what to do."""

import math

from torch import Tensor


def check_logits(student_logits: Tensor, teacher_logits: Tensor) -> None:
    """Refuse logits that are not floating point, or not of one shape and one device (``ValueError``)."""
    check_floating(student_logits, "student_logits")
    check_floating(teacher_logits, "teacher_logits")
    if student_logits.shape != teacher_logits.shape or student_logits.dim() == 0:
        raise ValueError(
            f"student_logits are {list(student_logits.shape)} and teacher_logits {list(teacher_logits.shape)}; "
            "both must be one shape [..., V]: score the same response tokens with both models, and cut a padded "
            "vocabulary to the shorter one"
        )
    check_device(student_logits, "student_logits", teacher_logits, "teacher_logits")


def check_floating(values: Tensor, name: str) -> None:
    """Refuse anything but a floating-point tensor (``ValueError``)."""
    if not values.is_floating_point():
        raise ValueError(f"{name} are {values.dtype}, not floating point: give a model's output, not token ids")


def check_device(first: Tensor, first_name: str, second: Tensor, second_name: str) -> None:
    """Refuse two tensors on two devices (``ValueError``)."""
    if first.device != second.device:
        raise ValueError(
            f"{first_name} are on {first.device} and {second_name} on {second.device}; move one with .to(device)"
        )


def check_positive(value: float, name: str) -> None:
    """Refuse a knob that is not a positive finite number (``ValueError``)."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive finite number")


def check_beta(beta: float) -> None:
    """Refuse a JSD weight outside of 0 < beta < 1, naming what to use at the two ends (``ValueError``)."""
    if not 0.0 < beta < 1.0:
        raise ValueError(
            f"beta is {beta!r}; JSD needs 0 < beta < 1, for at both ends it is zero for every pair of models. "
            "Use ForwardKL for KL(teacher ‖ student) (what JSD/beta tends to as beta goes to 0), or ReverseKL for "
            "KL(student ‖ teacher) (JSD/(1-beta) as beta goes to 1)"
        )


def check_alpha(alpha: float, unskewed: str) -> None:
    """Refuse a skew outside of 0 < alpha < 1, naming the KL that alpha = 0 would be (``ValueError``)."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(
            f"alpha is {alpha!r}; a skewed KL needs 0 < alpha < 1: it is zero at 1, and {unskewed} (use that) at 0"
        )
