"""Laws of divergences over any logits that hypothesis finds: huge, tiny, equal, impossible tokens."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, TopK

LOGIT = st.one_of(st.floats(-30, 30), st.floats(-1e4, 1e4), st.just(-math.inf), st.just(0.0))
SHARE = st.floats(0.01, 0.99)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Two rows of float64 logits over one vocabulary of 2 to 9 tokens; token 0 is always possible."""
    size = draw(st.integers(2, 9))
    rows = [[draw(st.floats(-30, 30)), *draw(st.lists(LOGIT, min_size=size - 1, max_size=size - 1))] for _ in range(2)]
    return torch.tensor(rows[0], dtype=torch.float64), torch.tensor(rows[1], dtype=torch.float64)


@st.composite
def divergences(draw: st.DrawFn) -> Divergence:
    """Any divergence, with any knob."""
    share = draw(SHARE)
    return draw(st.sampled_from([ForwardKL(), ReverseKL(), JSD(share), SkewKL(share), SkewReverseKL(share)]))


def close(one: Tensor, other: Tensor) -> bool:
    """Equal to rounding, infinities included."""
    return torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=300)
@given(pairs(), divergences())
def test_non_negative_finite_in_gradient_and_zero_at_equality(pair: tuple[Tensor, Tensor], loss: Divergence) -> None:
    student, teacher = pair[0].requires_grad_(), pair[1]
    value = loss(student, teacher)
    assert value.item() >= -1e-9
    value.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    assert close(loss(teacher, teacher), torch.zeros((), dtype=torch.float64))


@settings(deadline=None, max_examples=200)
@given(pairs(), divergences(), st.floats(-1e3, 1e3))
def test_a_shift_of_the_logits_changes_nothing(pair: tuple[Tensor, Tensor], loss: Divergence, shift: float) -> None:
    student, teacher = pair
    moved = loss(student + shift, teacher - shift)
    assert torch.allclose(moved, loss(student, teacher), rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=200)
@given(pairs(), SHARE)
def test_turning_the_two_models_round(pair: tuple[Tensor, Tensor], share: float) -> None:
    student, teacher = pair
    assert close(ForwardKL()(student, teacher), ReverseKL()(teacher, student))
    assert close(JSD(share)(student, teacher), JSD(1 - share)(teacher, student))
    assert close(SkewKL(share)(student, teacher), SkewReverseKL(share)(teacher, student))


@settings(deadline=None, max_examples=200)
@given(pairs(), SHARE)
def test_upper_bounds(pair: tuple[Tensor, Tensor], share: float) -> None:
    student, teacher = pair
    entropy = -share * math.log(share) - (1 - share) * math.log1p(-share)
    assert JSD(share)(student, teacher).item() <= entropy + 1e-9
    for loss in (SkewKL(share), SkewReverseKL(share)):
        assert loss(student, teacher).item() <= -math.log(share) + 1e-9


@settings(deadline=None, max_examples=300)
@given(pairs(), divergences(), st.integers(1, 10), st.sampled_from(["student", "teacher", "union", "intersection"]))
def test_a_bucket_is_at_most_the_whole(pair: tuple[Tensor, Tensor], loss: Divergence, k: int, support: str) -> None:
    student, teacher = pair[0].requires_grad_(), pair[1]
    joined = TopK(loss, k, support)(student, teacher)  # type: ignore[arg-type]
    whole = loss(student, teacher)
    assert -1e-9 <= joined.item() <= whole.item() + 1e-9
    joined.backward()
    assert student.grad is not None and student.grad.isfinite().all()
    if k >= len(student):
        assert close(joined, whole)
