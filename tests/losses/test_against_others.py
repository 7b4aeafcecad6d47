"""Other libraries' divergences, where the definitions are the same."""

import pytest
import torch
from loss_reference import random_pair
from torch.nn.functional import kl_div
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.regression import kl_divergence

from opcd.losses import JSD, ForwardKL, ReverseKL, top1_agreement

ROWS, V = 6, 40


@pytest.fixture
def pair():
    """Student's and teacher's logits, [6, 40] float64."""
    return random_pair(ROWS, V)


def test_torch_kl_div(pair) -> None:
    student, teacher = pair
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    torch.testing.assert_close(
        ForwardKL()(*pair), kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    )  # its second argument is the first of the KL
    torch.testing.assert_close(ReverseKL()(*pair), kl_div(theirs, ours, reduction="none", log_target=True).sum(-1))


def test_torchmetrics_kl_divergence(pair) -> None:
    student, teacher = (logits.log_softmax(-1) for logits in pair)
    torch.testing.assert_close(ForwardKL()(*pair), kl_divergence(teacher, student, log_prob=True, reduction="none"))
    torch.testing.assert_close(ReverseKL()(*pair), kl_divergence(student, teacher, log_prob=True, reduction="none"))


def test_torchmetrics_agreement(pair) -> None:
    student, teacher = pair[0], pair[0] + 0.7 * pair[1]
    expected = multiclass_accuracy(student.argmax(-1), teacher.argmax(-1), num_classes=V, average="micro")
    assert 0 < expected < 1
    torch.testing.assert_close(top1_agreement(student, teacher).mean(), expected)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_trl_generalized_jsd(pair, beta: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*(x[None] for x in pair), beta=beta, reduction="sum")
    torch.testing.assert_close(JSD(beta)(*pair).sum(), theirs)
