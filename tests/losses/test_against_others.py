"""Other libraries' divergences, where the definitions are the same."""

import pytest
import torch
from torch.nn.functional import kl_div
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.regression import kl_divergence

from opcd.losses import JSD, ForwardKL, ReverseKL, chunked_divergence, top1_agreement
from tests.helpers.loss_reference import random_pair

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


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_liger_fused_linear_jsd(beta: float) -> None:
    """Value and gradients from hidden states, where liger-kernel is installed; uncompiled, so on a CPU too."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    torch.manual_seed(0)
    shapes = [(ROWS, 8), (V, 8), (ROWS, 12), (V, 12)]
    hidden, matrix, teacher_hidden, teacher_matrix = (torch.randn(*shape, dtype=torch.float64) for shape in shapes)
    trained = [hidden.requires_grad_(), matrix.requires_grad_()]
    fused = chunked_loss.LigerFusedLinearJSDLoss(0.0, 1.0, beta, compiled=False, chunk_size=2)
    theirs = fused(*trained, teacher_hidden, teacher_matrix, torch.zeros(ROWS, dtype=torch.long))
    ours = chunked_divergence(JSD(beta), *trained, teacher_hidden, teacher_matrix).mean()
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=1e-6, atol=0.0)
    for mine, other in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(theirs, trained), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)
