"""Log-probabilities written over their logits, and gradients that are kept with the values."""

import pytest
import torch

from opcd.losses import JSD, Divergence, ForwardKL, Head, ReverseKL, TopK, chunked_divergence
from opcd.losses.chunking import chunked
from opcd.losses.log_probs import log_probs, log_probs_

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [1, 5, 1023, 1025, 50_001])
def test_in_place_they_are_the_same(device: str, dtype: torch.dtype, temperature: float, vocabulary: int) -> None:
    """Bit for bit, gradient included; the lengths cross the borders of torch's kernels."""
    torch.manual_seed(0)
    logits = (torch.randn(7, vocabulary, dtype=dtype) * 5).to(device).requires_grad_()
    weights = torch.randn(7, vocabulary, dtype=dtype).to(device)
    expected = log_probs(logits, temperature)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    mine = logits * 1.0
    found = log_probs_(mine, temperature)
    assert found.data_ptr() == mine.data_ptr()
    assert torch.equal(found, expected)
    (found_gradient,) = torch.autograd.grad((found * weights).sum(), logits)
    assert torch.equal(found_gradient, gradient)


def test_a_second_backward_pass_in_place_is_refused() -> None:
    logits = torch.randn(2, 5, requires_grad=True)
    value = log_probs_(logits * 1.0).square().sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JSD(0.3), TopK(ReverseKL(), 3, "union")])
def test_gradients_add_up_over_backward_passes(divergence: Divergence) -> None:
    """The gradient of a plain sum is handed on as it was kept: adding to it must not change what is kept."""
    torch.manual_seed(0)
    student = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1).requires_grad_()
    teacher = torch.randn(3, 9, dtype=torch.float64).log_softmax(-1)
    value = divergence.from_log_probs(student, teacher).sum()
    (once,) = torch.autograd.grad(value, student, retain_graph=True)
    once = once.clone()
    for _ in range(3):
        value.backward(retain_graph=True)
    torch.testing.assert_close(student.grad, 3 * once)


def test_logits_of_others_are_not_written_over() -> None:
    """A head that hands out what it keeps, as a function may, finds it unchanged."""
    torch.manual_seed(0)
    kept, hidden = torch.randn(4, 6), torch.randn(4, 3, requires_grad=True)
    before = kept.clone()
    chunked_divergence(ReverseKL(), hidden, torch.randn(6, 3), torch.zeros(4, 1), Head(lambda _: kept)).sum().backward()
    assert torch.equal(kept, before)


def test_a_statistic_that_is_a_view_keeps_its_chunk() -> None:
    """The memory of one chunk's log-probabilities serves the next; what a function returns of it stays."""
    torch.manual_seed(0)
    hidden, matrix = torch.randn(5, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)

    def function(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ReverseKL().from_log_probs(student, teacher), student[:, 2]

    _, third = chunked(function, hidden, matrix, hidden + 1, matrix.detach(), memory_bytes=1)
    torch.testing.assert_close(third, log_probs(hidden @ matrix.T)[:, 2].detach())
