"""The per-token clip and the statistics."""

import math

import pytest
import torch

from opcd.losses import ForwardKL, clip_nats, entropy, retained_mass, top1_agreement
from opcd.losses._kernels import kl
from tests.helpers.loss_reference import random_pair, softmax, value_and_gradient

INF = math.inf


def test_clip_bounds_the_value_and_stops_the_gradient() -> None:
    values = torch.tensor([-1.0, 0.5, 2.0, 7.0, INF], requires_grad=True)
    clipped = clip_nats(values, 2.5)
    assert clipped.tolist() == [-1.0, 0.5, 2.0, 2.5, 2.5]
    clipped.sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 1.0, 1.0, 0.0, 0.0]


def test_an_infinite_token_that_is_clipped_leaves_no_nan_behind() -> None:
    student = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 2.0]])
    teacher = torch.zeros(2, 3)
    values, gradient = value_and_gradient(lambda s, t: clip_nats(ForwardKL()(s, t), 5.0), student, teacher)
    assert values[0] == 5.0
    assert not gradient[0].any()
    torch.testing.assert_close(gradient[1], student[1].softmax(-1) - 1 / 3)


@pytest.mark.parametrize("max_nats", [0.0, -1.0, math.nan, INF])
def test_clip_refuses_what_is_not_positive(max_nats: float) -> None:
    with pytest.raises(ValueError, match=r"max_nats is .* positive"):
        clip_nats(torch.ones(2), max_nats)


def test_entropy_by_definition() -> None:
    logits, _ = random_pair(2, 3, 7)
    expected = [
        [-math.fsum(p * log_p for p, log_p in zip(*softmax(row), strict=True)) for row in rows]
        for rows in logits.tolist()
    ]
    torch.testing.assert_close(entropy(logits), torch.tensor(expected, dtype=torch.float64))
    assert not entropy(logits.requires_grad_()).requires_grad


def test_entropy_at_the_limits() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, -INF], [0.0, -INF, -INF, -INF], [1e4, -1e4, 0.0, 0.0]])
    torch.testing.assert_close(entropy(logits), torch.tensor([math.log(3), 0.0, 0.0]))


def test_top1_agreement_per_position() -> None:
    student = torch.tensor([[[1.0, 2.0, 0.0], [5.0, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0, 9.0, 8.0], [0.0, 0.0, 1.0]]])
    agreement = top1_agreement(student, teacher)
    assert agreement.tolist() == [[1.0, 0.0]]
    assert agreement.dtype == torch.float32
    assert not agreement.requires_grad


def test_retained_mass_of_given_tokens() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]).log()
    mass = retained_mass(logits, torch.tensor([[0, 2], [1, 2]]))
    torch.testing.assert_close(mass, torch.tensor([0.75, 0.9]))


def test_statistics_refuse_token_ids() -> None:
    ids = torch.zeros(2, 3, dtype=torch.long)
    for statistic in (entropy, lambda x: top1_agreement(x, x), lambda x: retained_mass(x, x)):
        with pytest.raises(ValueError, match="int64, not floating point"):
            statistic(ids)


def test_an_unreachable_token_adds_infinity_to_the_value_and_nothing_to_the_gradient() -> None:
    """KL(p ‖ q) with q = 0 at the third token and p = 0 at the fourth: the gradient is that of the first two terms."""
    log_p = torch.tensor([0.5, 0.3, 0.2, 0.0], dtype=torch.float64).log().requires_grad_()
    log_q = torch.tensor([0.6, 0.4, 0.0, 0.0], dtype=torch.float64).log().requires_grad_()
    value = kl(log_p, log_q)
    assert value.item() == float("inf")
    found = torch.autograd.grad(value, [log_p, log_q])
    reachable = (log_p[:2].exp() * (log_p[:2] - log_q[:2])).sum()
    expected = torch.autograd.grad(reachable, [log_p, log_q])
    torch.testing.assert_close(found, expected)
