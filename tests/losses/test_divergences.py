"""Every divergence against its definition: values and gradients, ordinary and extreme, and what it must refuse."""

import math

import pytest
import torch
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL, functional
from tests.helpers.loss_reference import DIVERGENCES, random_pair, reference, value_and_gradient

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES, ids=repr)
INF = math.inf

FUNCTIONS = {
    "ForwardKL": functional.forward_kl,
    "ReverseKL": functional.reverse_kl,
    "JSD": functional.jsd,
    "SkewKL": functional.skew_kl,
    "SkewReverseKL": functional.skew_reverse_kl,
}


def apply_function(divergence: Divergence, student: Tensor, teacher: Tensor) -> Tensor:
    """The pure function that belongs to a class, with its knobs."""
    return FUNCTIONS[type(divergence).__name__](student, teacher, **vars(divergence))


def extreme_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs for which every divergence is finite."""
    generator = torch.Generator().manual_seed(1)
    huge = [torch.randint(-1, 2, (20, 6), generator=generator, dtype=torch.float64) * 1e4 for _ in range(2)]
    student, teacher = random_pair(8, 6)
    never = torch.tensor([False, True, False, False, True, False])
    one_hot = torch.tensor([[0.0, -INF, -INF]], dtype=torch.float64)
    return {
        "huge": (huge[0], huge[1]),
        "huge against ordinary": (huge[0][:8], teacher),
        "ordinary against huge": (student, huge[1][:8]),
        "-inf in both": (student.masked_fill(never, -INF), teacher.masked_fill(never, -INF)),
        "one-hot, equal": (one_hot, one_hot.clone()),
        "one token": (student[:, :1], teacher[:, :1]),
    }


@every_divergence
@pytest.mark.parametrize("shape", [(7,), (5, 11), (2, 3, 33)], ids=str)
def test_matches_the_definition(divergence: Divergence, shape: tuple[int, ...]) -> None:
    student, teacher = random_pair(*shape)
    expected, gradient = reference(divergence, student, teacher)
    for loss in (divergence, lambda s, t: apply_function(divergence, s, t)):
        values, found = value_and_gradient(loss, student, teacher)
        torch.testing.assert_close(values, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-13)


@every_divergence
@pytest.mark.parametrize("name", extreme_pairs())
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_matches_the_definition_at_extremes(divergence: Divergence, name: str, dtype: torch.dtype) -> None:
    student, teacher = (logits.to(dtype) for logits in extreme_pairs()[name])
    expected, gradient = reference(divergence, student, teacher)
    values, found = value_and_gradient(divergence, student, teacher)
    assert expected.isfinite().all()
    # At 1e4 a float32 logit itself is good to 1e-3 nats.
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 2e-3}
    torch.testing.assert_close(values.double(), expected, **tolerance)
    torch.testing.assert_close(found.double(), gradient, **tolerance)


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (ForwardKL(), INF),
        (ReverseKL(), INF),
        (JSD(0.3), -0.3 * math.log(0.3) - 0.7 * math.log(0.7)),
        (SkewKL(0.1), -math.log(0.1)),
        (SkewReverseKL(0.2), -math.log(0.2)),
    ],
    ids=repr,
)
def test_disjoint_supports(divergence: Divergence, expected: float) -> None:
    student = torch.tensor([0.5, 1.0, -INF, -INF, -INF])
    teacher = torch.tensor([-INF, -INF, -INF, 2.0, 0.0])
    values, gradient = value_and_gradient(divergence, student, teacher)
    torch.testing.assert_close(values, torch.tensor(expected))
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "expected"),
    [
        (ForwardKL(), 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)),
        (ReverseKL(), 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)),
        (JSD(0.2), 0.2 * math.log(0.5 / 0.3) * 0.5 + 0.2 * 0.5 * math.log(0.5 / 0.7)
         + 0.8 * 0.25 * math.log(0.25 / 0.3) + 0.8 * 0.75 * math.log(0.75 / 0.7)),
        (SkewKL(0.2), 0.5 * math.log(0.5 / 0.3) + 0.5 * math.log(0.5 / 0.7)),
        (SkewReverseKL(0.2), 0.25 * math.log(0.25 / 0.45) + 0.75 * math.log(0.75 / 0.55)),
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_worked_by_hand(divergence: Divergence, expected: float) -> None:
    """p_S = (1/4, 3/4), p_T = (1/2, 1/2): the directions of the KLs, and whose share beta and alpha are."""
    student, teacher = torch.tensor([0.25, 0.75]).log(), torch.tensor([0.5, 0.5]).log()
    torch.testing.assert_close(divergence(student, teacher), torch.tensor(expected))


@every_divergence
def test_a_divergence_is_positive_and_zero_only_at_equality(divergence: Divergence) -> None:
    student, teacher = random_pair(200, 9)
    assert (divergence(student, teacher) > 1e-4).all()
    values, gradient = value_and_gradient(divergence, student, student + 3.0)
    torch.testing.assert_close(values, torch.zeros(200, dtype=torch.float64))
    torch.testing.assert_close(gradient, torch.zeros_like(student))


@every_divergence
def test_shifting_logits_changes_nothing(divergence: Divergence) -> None:
    student, teacher = random_pair(4, 9)
    torch.testing.assert_close(divergence(student + 100.0, teacher - 50.0), divergence(student, teacher))


@every_divergence
def test_temperature_divides_both_logits(divergence: Divergence) -> None:
    student, teacher = random_pair(4, 9)
    expected, gradient = reference(divergence, student / 0.7, teacher / 0.7)
    values, found = value_and_gradient(lambda s, t: divergence(s, t, temperature=0.7), student, teacher)
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(found, gradient / 0.7)


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_precision_logits_are_computed_in_float32(divergence: Divergence, dtype: torch.dtype) -> None:
    student, teacher = random_pair(6, 50, dtype=dtype)
    expected, gradient = reference(divergence, student.double(), teacher.double())
    values, found = value_and_gradient(divergence, student, teacher)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=2e-5, atol=1e-6)
    rtol = 2e-5 if dtype == torch.float32 else 2**-7  # the gradient comes back in the dtype of the logits
    torch.testing.assert_close(found.double(), gradient, rtol=rtol, atol=1e-6)


@every_divergence
def test_gradcheck_of_the_function_in_both_arguments(divergence: Divergence) -> None:
    student, teacher = (logits.requires_grad_() for logits in random_pair(2, 4))
    assert torch.autograd.gradcheck(lambda s, t: apply_function(divergence, s, t), (student, teacher))


@every_divergence
def test_the_teacher_gets_no_gradient(divergence: Divergence) -> None:
    student, teacher = (logits.requires_grad_() for logits in random_pair(3, 5))
    divergence(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@every_divergence
def test_a_mask_equals_the_subset(divergence: Divergence) -> None:
    student, teacher = random_pair(6, 9)
    mask = torch.tensor([True, False, True, True, False, False])
    values, gradient = value_and_gradient(lambda s, t: divergence(s, t) * mask, student, teacher)
    subset, subset_gradient = value_and_gradient(divergence, student[mask], teacher[mask])
    torch.testing.assert_close(values[mask], subset)
    torch.testing.assert_close(gradient[mask], subset_gradient)
    assert not gradient[~mask].any()


def test_nan_logits_are_not_hidden() -> None:
    student, teacher = random_pair(2, 4)
    student[0, 1] = math.nan
    for divergence in DIVERGENCES:
        assert divergence(student, teacher).isnan().tolist() == [True, False]


@pytest.mark.parametrize("beta", [0.0, 1.0, 0, 1, -0.1, 1.5, math.nan])
def test_jsd_refuses_the_ends_and_names_the_two_kls(beta: float) -> None:
    for make in (lambda: JSD(beta), lambda: functional.jsd(*random_pair(2, 3), beta=beta)):
        with pytest.raises(ValueError, match=r"0 < beta < 1.*ForwardKL.*ReverseKL"):
            make()


@pytest.mark.parametrize(("skewed", "plain"), [(SkewKL, "ForwardKL"), (SkewReverseKL, "ReverseKL")])
@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.5])
def test_a_skew_refuses_the_ends(skewed: type[SkewKL] | type[SkewReverseKL], plain: str, alpha: float) -> None:
    with pytest.raises(ValueError, match=f"0 < alpha < 1.* {plain} "):
        skewed(alpha)


@every_divergence
def test_wrong_logits_are_refused(divergence: Divergence) -> None:
    student, teacher = random_pair(2, 3, 5)
    with pytest.raises(ValueError, match=r"\[2, 3, 5\].*\[2, 3, 4\].*shorter"):
        divergence(student, teacher[..., :4])
    with pytest.raises(ValueError, match=r"\[3, 5\]"):  # would broadcast
        divergence(student, teacher[0])
    with pytest.raises(ValueError, match=r"teacher_logits are torch.int64, not floating point"):
        divergence(student, teacher.long())
    with pytest.raises(ValueError, match=r"student_logits are on cpu and teacher_logits on meta"):
        divergence(student, teacher.to("meta"))


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_a_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature is .* positive"):
        ReverseKL()(*random_pair(2, 3), temperature=temperature)


def test_repr_shows_the_knobs() -> None:
    assert repr(ForwardKL()) == "ForwardKL()"
    assert repr(JSD(beta=0.5)) == "JSD(beta=0.5)"
    assert repr(SkewReverseKL(0.2)) == "SkewReverseKL(alpha=0.2)"


def test_the_interface_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Divergence()  # type: ignore[abstract]


@pytest.mark.parametrize("loss", [ForwardKL(), ReverseKL(), JSD(0.3)])
@pytest.mark.parametrize("numbers", [1, 3 * 11, 10**9])
def test_rows_computed_a_few_at_a_time_change_nothing(
    monkeypatch: pytest.MonkeyPatch, loss: Divergence, numbers: int
) -> None:
    """A block on a CPU may hold one row, three of ten, or all; both logits get their gradient."""
    torch.manual_seed(0)
    logits = [torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def results() -> tuple[Tensor, ...]:
        value = loss.from_log_probs(*(x.log_softmax(-1) for x in logits))
        weights = torch.arange(10, dtype=torch.float64).view(2, 5)
        return value, *torch.autograd.grad((value * weights).sum(), logits)

    whole = results()
    monkeypatch.setattr("opcd.losses._kernels.BLOCK", numbers)
    for expected, found in zip(whole, results(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-14)
