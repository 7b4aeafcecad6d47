"""The top-k wrapper against its definition, for every support, tail and inner divergence."""

import itertools
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL, TopK
from opcd.losses.topk import Support, Tail
from tests.helpers.loss_reference import DIVERGENCES, random_pair, term, value_and_gradient

INF = math.inf
SUPPORTS, TAILS = get_args(Support), get_args(Tail)
every_divergence = pytest.mark.parametrize("inner", DIVERGENCES, ids=repr)
every_support = pytest.mark.parametrize("support", SUPPORTS)
every_tail = pytest.mark.parametrize("tail", TAILS)
pytestmark = pytest.mark.filterwarnings("ignore:tail='drop':UserWarning")


def every_choice(inner: Divergence, tail: str, *ks: int) -> Iterator[TopK]:
    """All supports with all ks, but for the choices that are refused: a single token renormalized."""
    for support, k in itertools.product(SUPPORTS, ks):
        if not (tail == "renormalize" and k == 1 and support != "union"):
            yield TopK(inner, k, support, tail)  # type: ignore[arg-type]


def chosen(student: Tensor, teacher: Tensor, k: int, support: str) -> list[int]:
    """The ids of one row's support."""
    students, teachers = (
        set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (student.tolist(), teacher.tolist())
    )
    sets = {"student": students, "teacher": teachers, "union": students | teachers, "intersection": students & teachers}
    return sorted(sets[support])


def outcomes(logits: Tensor, tokens: list[int], tail: str) -> Tensor:
    """One row's probabilities of the compared outcomes, from the definition."""
    p = logits.softmax(-1)
    kept = p[tokens]
    rest = [v for v in range(len(p)) if v not in tokens]
    return {
        "bucket": torch.cat([kept, p[rest].sum()[None]]),
        "renormalize": kept / kept.sum(),
        "drop": kept,
    }[tail]


def naive(inner: Divergence, ps: Tensor, pt: Tensor) -> Tensor:
    """The inner divergence of two positive measures, differentiable, as the formula is written."""
    name, share = type(inner).__name__, next(iter(vars(inner).values()), 0.0)
    m = share * ps + (1 - share) * pt if name == "SkewReverseKL" else share * pt + (1 - share) * ps

    def sum_kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log()).sum()

    return {
        "ForwardKL": lambda: sum_kl(pt, ps),
        "ReverseKL": lambda: sum_kl(ps, pt),
        "JSD": lambda: share * sum_kl(pt, m) + (1 - share) * sum_kl(ps, m),
        "SkewKL": lambda: sum_kl(pt, m),
        "SkewReverseKL": lambda: sum_kl(ps, m),
    }[name]()


def reference(loss: TopK, student: Tensor, teacher: Tensor) -> Tensor:
    """Values [N] of [N, V] logits, from the definition."""
    values = []
    for s, t in zip(student, teacher, strict=True):
        tokens = chosen(s, t, loss.k, loss.support)
        values.append(naive(loss.inner, outcomes(s, tokens, loss.tail), outcomes(t, tokens, loss.tail)))
    return torch.stack(values)


@every_divergence
@every_tail
def test_matches_the_definition(inner: Divergence, tail: str) -> None:
    student, teacher = random_pair(5, 17)
    for loss in every_choice(inner, tail, 1, 2, 7):
        expected, gradient = value_and_gradient(lambda s, t, loss=loss: reference(loss, s, t), student, teacher)
        values, found = value_and_gradient(loss, student, teacher)
        torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found, gradient, rtol=1e-9, atol=1e-12)


@every_divergence
@every_tail
def test_all_of_the_vocabulary_is_the_full_divergence(inner: Divergence, tail: str) -> None:
    student, teacher = random_pair(2, 3, 17)
    expected, expected_gradient = value_and_gradient(inner, student, teacher)
    for loss in every_choice(inner, tail, 17, 18, 4000):
        values, gradient = value_and_gradient(loss, student, teacher)
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=0)
        for mass in loss.with_retained_mass(student.log_softmax(-1), teacher.log_softmax(-1))[1:]:
            torch.testing.assert_close(mass, torch.ones(2, 3, dtype=torch.float64))


@every_divergence
def test_a_bucket_never_exceeds_the_full_divergence(inner: Divergence) -> None:
    """The data-processing inequality: joining outcomes can only bring two distributions closer."""
    student, teacher = random_pair(100, 23)
    full = inner(student, teacher)
    for loss in every_choice(inner, "bucket", 1, 3, 12):
        bucketed = loss(student, teacher)
        assert (bucketed <= full + 1e-12).all()
        assert (bucketed >= -1e-12).all()
        assert (bucketed < full - 1e-6).any()


@every_divergence
@every_tail
def test_zero_at_equality(inner: Divergence, tail: str) -> None:
    logits, _ = random_pair(5, 13)
    for loss in every_choice(inner, tail, 1, 4):
        torch.testing.assert_close(loss(logits, logits + 1.0), torch.zeros(5, dtype=torch.float64))


@every_divergence
@every_tail
def test_extremes_leave_no_nan(inner: Divergence, tail: str) -> None:
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randint(-1, 2, (40, 8), generator=generator) * 1e4 for _ in range(2))
    student[::3, 4:], teacher[::3, 4:] = -INF, -INF  # no mass at all outside of the k = 4 likeliest
    student[1::3, :5], teacher[2::3, 2:] = -INF, -INF  # and some on one side alone
    for loss in every_choice(inner, tail, 1, 2, 4, 7):
        values, gradient = value_and_gradient(loss, student, teacher)
        assert not values.isnan().any()
        assert gradient.isfinite().all()


def test_a_rest_without_mass_adds_nothing() -> None:
    student, teacher = random_pair(6, 4)
    nowhere = torch.full((6, 3), -INF, dtype=torch.float64)
    for inner in DIVERGENCES:
        values, gradient = value_and_gradient(
            TopK(inner, k=4), torch.cat([student, nowhere], -1), torch.cat([teacher, nowhere], -1)
        )
        expected, expected_gradient = value_and_gradient(inner, student, teacher)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(gradient[:, :4], expected_gradient)


def test_a_tiny_rest_is_not_lost_in_float32() -> None:
    """The rest holds 1e-9 in one model and 1e-7 in the other: 1 − retained mass would be noise."""
    student, teacher = torch.zeros(2, 1, 1001), torch.zeros(2, 1, 1001)
    student[..., 0], teacher[..., 0] = math.log(1000 / 1e-9), math.log(1000 / 1e-7)
    values, gradient = value_and_gradient(TopK(ForwardKL(), k=1), student, teacher)
    expected, expected_gradient = value_and_gradient(ForwardKL(), student.double(), teacher.double())
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=2e-7)  # log_softmax itself is no finer
    torch.testing.assert_close(gradient.double()[..., 1:], expected_gradient[..., 1:], rtol=1e-4, atol=0)


@every_tail
def test_an_empty_intersection_is_zero(tail: str) -> None:
    student, teacher = torch.tensor([[3.0, 2.0, 0.0, 0.0, 0.1]]), torch.tensor([[0.0, 0.1, 3.0, 2.0, 0.0]])
    for inner in DIVERGENCES:
        loss = TopK(inner, 2, "intersection", tail)  # type: ignore[arg-type]
        values, gradient = value_and_gradient(loss, student, teacher)
        assert values.abs().item() < 1e-6
        assert gradient.abs().max() < 1e-6
        assert [m.item() for m in loss.with_retained_mass(student.log_softmax(-1), teacher.log_softmax(-1))[1:]] == [
            0,
            0,
        ]


@every_support
def test_retained_mass(support: str) -> None:
    student, teacher = random_pair(9, 15)
    loss = TopK(ReverseKL(), 4, support)  # type: ignore[arg-type]
    _, *masses = loss.with_retained_mass(
        (student.requires_grad_() / 0.7).log_softmax(-1), (teacher / 0.7).log_softmax(-1)
    )
    for mass, logits in zip(masses, (student, teacher), strict=True):
        expected = [
            (row / 0.7).softmax(-1)[chosen(s, t, 4, support)].sum()
            for row, s, t in zip(logits.detach(), student.detach(), teacher, strict=True)
        ]
        torch.testing.assert_close(mass, torch.stack(expected))
        assert not mass.requires_grad


@every_tail
def test_gradcheck(tail: str) -> None:
    student, teacher = random_pair(2, 6)
    for loss in every_choice(JSD(0.3), tail, 2):
        assert torch.autograd.gradcheck(lambda s, loss=loss: loss(s, teacher), student.requires_grad_())


def test_dropping_the_tail_can_be_negative_and_warns() -> None:
    with pytest.warns(UserWarning, match=r"not a divergence.*moving mass.*k=256.*bucket") as caught:
        loss = TopK(ReverseKL(), k=1, tail="drop")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    student, teacher = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.9, 0.05, 0.05]).log()
    torch.testing.assert_close(loss(student, teacher), torch.tensor(0.5 * math.log(0.5 / 0.9)))


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = (logits.requires_grad_() for logits in random_pair(3, 9))
    for tail in TAILS:
        for loss in every_choice(ReverseKL(), tail, 3):
            loss(student, teacher).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"inner": TopK(ReverseKL())}, "inner is a TopK already"),
        ({"k": 0}, "k is 0; it must be at least 1"),
        ({"support": "both"}, "support is 'both'; choose one of student, teacher, union, intersection"),
        ({"tail": "cut"}, "tail is 'cut'; choose one of bucket, renormalize, drop"),
        ({"k": 1, "tail": "renormalize"}, "zero for every pair of models.*tail='bucket'"),
        ({"k": 1, "tail": "renormalize", "support": "teacher"}, "zero for every pair"),
        ({"k": 1, "tail": "renormalize", "support": "intersection"}, "zero for every pair"),
    ],
)
def test_a_choice_that_cannot_work_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TopK(**{"inner": ReverseKL(), **arguments})


def test_repr_and_defaults() -> None:
    assert repr(TopK(JSD(beta=0.5))) == "TopK(inner=JSD(beta=0.5), k=256, support='student', tail='bucket')"


def test_the_naive_sum_agrees_with_the_row_reference() -> None:
    """The two references of these tests were written apart; they must not disagree."""
    student, teacher = (logits.softmax(-1) for logits in random_pair(9))
    for inner in DIVERGENCES:
        tokens = zip(student.tolist(), student.log().tolist(), teacher.tolist(), teacher.log().tolist(), strict=True)
        torch.testing.assert_close(naive(inner, student, teacher).item(), math.fsum(term(inner, *t)[0] for t in tokens))
