"""The one-sample reverse KL: averaged over the vocabulary, its value and gradient are those of the reverse KL."""

import pytest
import torch
from torch import Tensor

from opcd.losses import ReverseKL, SampledReverseKL, sampled_reverse_kl
from tests.helpers.loss_reference import random_pair, reference

V = 7


def expected(
    student: Tensor, teacher: Tensor, rollout: Tensor, known: bool, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Value and gradient of the estimate, averaged over every token with the probability that the rollout gives it."""
    student = student.clone().requires_grad_()
    ours, theirs, sampled = student.log_softmax(-1), teacher.log_softmax(-1), rollout.log_softmax(-1)
    estimate = SampledReverseKL(clip)(ours, theirs, sampled if known else None)  # of all V tokens at once
    value = (sampled.exp() * estimate).sum(-1)
    return value.detach(), torch.autograd.grad(value.sum(), student)[0]


def test_its_expectation_is_the_reverse_kl() -> None:
    student, teacher = random_pair(5, V)
    found = expected(student, teacher, student, known=False, clip=None)
    torch.testing.assert_close(found, reference(ReverseKL(), student, teacher))


@pytest.mark.parametrize("clip", [None, 1e6])
def test_importance_weights_correct_for_another_policy(clip: float | None) -> None:
    student, teacher = random_pair(5, V)
    stale, _ = random_pair(5, V, seed=3)
    torch.testing.assert_close(
        expected(student, teacher, stale, known=True, clip=clip), reference(ReverseKL(), student, teacher)
    )
    biased, _ = expected(student, teacher, stale, known=False, clip=None)
    assert (biased - reference(ReverseKL(), student, teacher)[0]).abs().max() > 0.1


def test_the_clip_bounds_the_weight_and_not_the_advantage() -> None:
    student = torch.tensor([-1.0, -1.0], requires_grad=True)
    teacher, rollout = torch.tensor([-4.0, -4.0]), torch.tensor([-6.0, -0.5])
    values = sampled_reverse_kl(student, teacher, rollout, importance_clip=2.0)
    ratio = torch.tensor([2.0, torch.exp(torch.tensor(-0.5)).item()])  # e^5 is clipped, e^-0.5 is not
    torch.testing.assert_close(values.detach(), ratio * 3.0)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), student)[0], ratio * 3.0)


def test_the_advantage_has_the_sign_of_the_teachers_preference() -> None:
    """A token that the teacher likes better gets likelier under gradient descent: its derivative is negative."""
    student = torch.tensor([-2.0, -2.0], requires_grad=True)
    values = SampledReverseKL()(student, torch.tensor([-1.0, -3.0]))
    assert torch.autograd.grad(values.sum(), student)[0].tolist() == [-1.0, 1.0]


def test_the_teacher_and_the_rollout_get_no_gradient() -> None:
    student, teacher, rollout = (torch.tensor([-1.0, -2.0], requires_grad=True) for _ in range(3))
    sampled_reverse_kl(student, teacher, rollout).sum().backward()
    assert student.grad is not None and teacher.grad is None and rollout.grad is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SampledReverseKL(0.0), "importance_clip is 0.0"),
        (lambda: SampledReverseKL(2.0)(torch.zeros(3), torch.zeros(3)), "no effect without rollout_log_probs"),
        (
            lambda: sampled_reverse_kl(torch.zeros(3, 5), torch.zeros(3)),
            r"\[3, 5\] and teacher_log_probs \[3\]",
        ),
        (lambda: sampled_reverse_kl(torch.zeros(3), torch.zeros(3, dtype=torch.long)), "not floating point"),
        (lambda: sampled_reverse_kl(torch.zeros(3), torch.zeros(3, device="meta")), "on cpu and teacher_log_probs on"),
    ],
)
def test_bad_arguments_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
