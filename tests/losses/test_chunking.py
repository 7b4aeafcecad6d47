"""The chunked form against the dense one: values and every gradient, and that no [N, V] is made or kept."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from opcd.losses import (
    JSD,
    Divergence,
    ForwardKL,
    Head,
    ReverseKL,
    SkewReverseKL,
    TopK,
    chunked,
    chunked_divergence,
    entropy,
    top1_agreement,
)
from opcd.losses import log_probs as measure
from opcd.losses.chunking import LIVE
from tests.helpers.loss_reference import random_pair

N, V, H_S, H_T = 23, 40, 6, 10
ROW = 4 * V * LIVE  # bytes that one row of a chunk is allowed
chunk_sizes = pytest.mark.parametrize("memory_bytes", [1, 5 * ROW, 10**9])


class LowRankHead(nn.Module):
    """A frozen matrix with a trained adapter on it, as LoRA puts on a head."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.base = nn.Linear(H_S, V, bias=False, dtype=dtype).requires_grad_(False)
        self.down, self.up = nn.Linear(H_S, 2, bias=False, dtype=dtype), nn.Linear(2, V, bias=False, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


def leaf(*shape: int, seed: int) -> Tensor:
    """A float64 parameter."""
    return random_pair(*shape, seed=seed, spread=1.0)[0].requires_grad_()


def upstream(values: Tensor) -> Tensor:
    """A scalar that weighs every token differently."""
    return (values * torch.linspace(-1, 2, N, dtype=values.dtype)).sum()


def agree(
    divergence: Divergence,
    student_head: Head,
    parameters: list[Tensor],
    dense_logits: Callable[[Tensor], Tensor],
    memory_bytes: int,
    temperature: float = 1.0,
) -> None:
    """Chunked and dense give the same values, and the same gradients in the hidden states and all the parameters."""
    hidden, teacher_hidden, teacher_matrix = leaf(N, H_S, seed=3), leaf(N, H_T, seed=4), leaf(V, H_T, seed=5)
    values = chunked_divergence(
        divergence,
        hidden,
        student_head,
        teacher_hidden,
        teacher_matrix,
        temperature=temperature,
        memory_bytes=memory_bytes,
    )
    dense = divergence(dense_logits(hidden), teacher_hidden @ teacher_matrix.T, temperature=temperature)
    assert values.shape == (N,)
    torch.testing.assert_close(values, dense)
    found = torch.autograd.grad(upstream(values), [hidden, *parameters])
    torch.testing.assert_close(found, torch.autograd.grad(upstream(dense), [hidden, *parameters]))
    assert all(gradient.abs().max() > 1e-3 for gradient in found)


@chunk_sizes
@pytest.mark.parametrize(
    "divergence",
    [ForwardKL(), ReverseKL(), JSD(0.3), SkewReverseKL(), TopK(ReverseKL(), k=5), TopK(JSD(), 3, "union")],
    ids=repr,
)
def test_a_matrix(divergence: Divergence, memory_bytes: int) -> None:
    matrix = leaf(V, H_S, seed=1)
    agree(divergence, Head(matrix), [matrix], lambda hidden: hidden @ matrix.T, memory_bytes)


@chunk_sizes
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_bias_scale_softcap_and_temperature(memory_bytes: int, temperature: float) -> None:
    matrix, bias = leaf(V, H_S, seed=1), leaf(V, seed=2)
    head = Head(matrix, bias=bias, softcap=3.0, scale=0.5)

    def dense_logits(hidden: Tensor) -> Tensor:
        return 3.0 * torch.tanh(0.5 * (hidden @ matrix.T + bias) / 3.0)

    agree(ReverseKL(), head, [matrix, bias], dense_logits, memory_bytes, temperature)


@chunk_sizes
def test_a_module_with_an_adapter(memory_bytes: int) -> None:
    module = LowRankHead()
    parameters = [module.down.weight, module.up.weight]
    agree(ReverseKL(), Head(module), parameters, module, memory_bytes)
    assert module.base.weight.grad is None


@chunk_sizes
def test_a_function_that_closes_over_its_weights(memory_bytes: int) -> None:
    factor, matrix = leaf(V, V, seed=1), leaf(V, H_S, seed=2)

    def project(hidden: Tensor) -> Tensor:
        return hidden @ (factor @ matrix).T

    agree(ReverseKL(), Head(project), [factor, matrix], project, memory_bytes)


def test_the_teacher_gets_no_gradient() -> None:
    hidden, matrix = leaf(N, H_S, seed=3), leaf(V, H_S, seed=1)
    teacher_hidden, teacher_module = leaf(N, H_S, seed=4), LowRankHead()
    chunked_divergence(ReverseKL(), hidden, matrix, teacher_hidden, teacher_module).sum().backward()
    assert matrix.grad is not None
    assert teacher_hidden.grad is None
    assert all(parameter.grad is None for parameter in teacher_module.parameters())


def test_a_tied_weight_gathers_both_of_its_gradients() -> None:
    """The embedding is the head: hidden states depend on the matrix that then projects them."""
    tokens, teacher_hidden, teacher_matrix = torch.arange(N) % V, leaf(N, H_T, seed=4), leaf(V, H_T, seed=5)
    gradients = []
    for memory_bytes in (None, 4 * ROW):
        matrix = leaf(V, H_S, seed=1)
        hidden = torch.tanh(nn.functional.embedding(tokens, matrix))
        if memory_bytes is None:
            values = ReverseKL()(hidden @ matrix.T, teacher_hidden @ teacher_matrix.T)
        else:
            values = chunked_divergence(
                ReverseKL(), hidden, matrix, teacher_hidden, teacher_matrix, memory_bytes=memory_bytes
            )
        upstream(values).backward()
        gradients.append(matrix.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(V, V + 7), (V + 7, V)])
def test_padding_rows_of_the_longer_vocabulary_are_cut(student_rows: int, teacher_rows: int) -> None:
    hidden, teacher_hidden = leaf(N, H_S, seed=3), leaf(N, H_T, seed=4)
    matrix, teacher_matrix = leaf(student_rows, H_S, seed=1), leaf(teacher_rows, H_T, seed=5)
    values = chunked_divergence(ReverseKL(), hidden, matrix, teacher_hidden, teacher_matrix, memory_bytes=3 * ROW)
    dense = ReverseKL()(hidden @ matrix[:V].T, teacher_hidden @ teacher_matrix[:V].T)
    torch.testing.assert_close(values, dense)
    found = torch.autograd.grad(upstream(values), [hidden, matrix])
    torch.testing.assert_close(found, torch.autograd.grad(upstream(dense), [hidden, matrix]))
    assert not found[1][V:].any()


@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head for both"])
def test_bfloat16_autocast(shared: bool) -> None:
    """The projection rounds to bfloat16, the divergence of those logits is computed in float32."""
    hidden, teacher_hidden, matrix, teacher_matrix = (
        random_pair(*shape, seed=seed, dtype=torch.float32, spread=1.0)[0].requires_grad_()
        for seed, shape in enumerate([(N, H_S), (N, H_S), (V, H_S), (V, H_S)])
    )
    teacher_matrix = matrix if shared else teacher_matrix
    with torch.autocast("cpu", torch.bfloat16):
        values = chunked_divergence(ReverseKL(), hidden, matrix, teacher_hidden, teacher_matrix, memory_bytes=4 * ROW)
        dense = ReverseKL()(hidden @ matrix.T, teacher_hidden @ teacher_matrix.T)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, dense)
    found = torch.autograd.grad(upstream(values), [hidden, matrix])
    expected = torch.autograd.grad(upstream(dense), [hidden, matrix])
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)  # sums of bfloat16 gradients, chunk by chunk
    assert all(gradient.dtype == torch.float32 for gradient in found)


def test_no_tokens_give_an_empty_tensor_and_zero_gradients() -> None:
    hidden, matrix = torch.zeros(0, H_S, requires_grad=True), torch.randn(V, H_S, requires_grad=True)
    for divergence in (ReverseKL(), TopK(JSD(), k=3)):
        values = chunked_divergence(divergence, hidden, matrix, torch.zeros(0, H_T), torch.randn(V, H_T))
        assert values.shape == (0,)
        gradients = torch.autograd.grad(values.sum(), [hidden, matrix])
        assert [list(gradient.shape) for gradient in gradients] == [[0, H_S], [V, H_S]]
        assert not gradients[1].any()


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation makes, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("divergence", [ReverseKL(), JSD(), TopK(ForwardKL(), k=3, support="union")], ids=repr)
def test_the_logits_of_all_tokens_are_never_made_and_none_are_kept(divergence: Divergence) -> None:
    tokens, vocabulary, rows = 120, 200, 6
    hidden, matrix = torch.randn(tokens, 4, requires_grad=True), torch.randn(vocabulary, 4, requires_grad=True)
    saved: list[weakref.ref[Tensor]] = []
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(weakref.ref(x)) or x, lambda x: x):
            values = chunked_divergence(
                divergence,
                hidden,
                matrix,
                torch.randn(tokens, 4),
                torch.randn(vocabulary, 4),
                memory_bytes=rows * vocabulary * 4 * LIVE,
            )
        assert rows * vocabulary <= largest.elements <= rows * (vocabulary + 1)
        assert len(saved) > 2 * tokens // rows  # within the chunks
        assert sum(x.numel() for ref in saved if (x := ref()) is not None) < rows * vocabulary  # after them
        values.sum().backward()
    assert rows * vocabulary <= largest.elements <= rows * (vocabulary + 1)


@pytest.fixture
def counted():
    """A function with statistics, a head, and how often each was called."""
    matrix, calls = leaf(V, H_S, seed=1), {"value": 0, "projection": 0}

    def project(rows: Tensor) -> Tensor:
        calls["projection"] += 1
        return rows @ matrix.T

    def function(student: Tensor, teacher: Tensor) -> tuple[Tensor, ...]:
        calls["value"] += 1
        value = ReverseKL().from_log_probs(student, teacher)
        return value, measure.entropy(student), top1_agreement(student, teacher), value * 2

    return function, project, matrix, calls


CHUNKS = 4  # 23 rows by 6


def test_statistics_come_from_the_same_projection(counted) -> None:
    function, project, matrix, calls = counted
    hidden, teacher_hidden, teacher_matrix = leaf(N, H_S, seed=3), leaf(N, H_T, seed=4), leaf(V, H_T, seed=5)
    value, student_entropy, agreement, doubled = chunked(
        function, hidden, project, teacher_hidden, teacher_matrix, temperature=0.5, memory_bytes=6 * ROW
    )
    student, teacher = hidden @ matrix.T / 0.5, teacher_hidden @ teacher_matrix.T / 0.5
    torch.testing.assert_close(value, ReverseKL()(student, teacher))
    torch.testing.assert_close(student_entropy, entropy(student))
    torch.testing.assert_close(agreement, top1_agreement(student, teacher))
    assert value.requires_grad
    assert not any(statistic.requires_grad for statistic in (student_entropy, agreement, doubled))
    assert calls == {"value": CHUNKS, "projection": CHUNKS + 2}  # one row to learn V, and one to find the weights


@pytest.mark.parametrize("head", ["matrix", "function"])
@pytest.mark.parametrize("known", [False, True], ids=["all alike", "weights given"])
def test_expected_weights_leave_nothing_to_the_backward_pass(counted, head, known) -> None:
    function, project, matrix, calls = counted
    weights = torch.linspace(-1, 2, N, dtype=torch.float64) if known else torch.full((N,), 0.25, dtype=torch.float64)
    hidden, teacher_hidden, teacher_matrix = leaf(N, H_S, seed=3), leaf(N, H_T, seed=4), leaf(V, H_T, seed=5)
    student_head = matrix if head == "matrix" else project
    value, *_ = chunked(
        function,
        hidden,
        student_head,
        teacher_hidden,
        teacher_matrix,
        weights=3 * weights if known else None,
        memory_bytes=6 * ROW,
    )
    found = torch.autograd.grad((value * weights).sum(), [hidden, matrix], retain_graph=True)
    assert calls["value"] == CHUNKS
    dense = ReverseKL()(hidden @ matrix.T, teacher_hidden @ teacher_matrix.T)
    torch.testing.assert_close(found, torch.autograd.grad((dense * weights).sum(), [hidden, matrix], retain_graph=True))
    # A second backward pass, and one with other weights, are as right, and compute again.
    again = torch.autograd.grad((value * weights).sum(), [hidden, matrix], retain_graph=True)
    torch.testing.assert_close(again, found)
    others = torch.autograd.grad(value[:3].sum(), [hidden, matrix])
    torch.testing.assert_close(others, torch.autograd.grad(dense[:3].sum(), [hidden, matrix]))
    assert calls["value"] == 3 * CHUNKS


def test_without_gradient_none_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opcd.losses.chunking._with_gradient", None)
    hidden, matrix = leaf(N, H_S, seed=3), leaf(V, H_S, seed=1)
    with torch.no_grad():
        values = chunked_divergence(ForwardKL(), hidden, matrix, hidden + 1, matrix, memory_bytes=5 * ROW)
        torch.testing.assert_close(values, ForwardKL()(hidden @ matrix.T, (hidden + 1) @ matrix.T))
    assert not values.requires_grad


def test_dropout_on_the_head_is_replayed_in_a_second_pass() -> None:
    """The gradient must belong to the mask that made the value, though other random numbers were drawn in between."""
    hidden, matrix, masks = leaf(N, H_S, seed=3), leaf(V, H_S, seed=1), []

    def project(rows: Tensor) -> Tensor:
        masks.append(torch.rand_like(rows) < 0.5)
        return (rows * masks[-1]) @ matrix.T

    values = chunked_divergence(ReverseKL(), hidden, project, hidden, matrix)
    torch.rand(7)
    upstream(values).backward()
    *_, forward, backward = masks
    assert torch.equal(forward, backward)
    assert len(masks) == 4  # the first two were drawn to learn V and to find the weights


def test_a_linear_module_with_a_bias() -> None:
    module = nn.Linear(H_S, V, dtype=torch.float64)
    agree(ReverseKL(), Head(module), [module.weight, module.bias], module, 5 * ROW)


def test_frozen_weights_get_no_gradient() -> None:
    hidden, frozen = leaf(N, H_S, seed=3), leaf(V, H_S, seed=1).detach()
    values = chunked_divergence(ReverseKL(), hidden, frozen, hidden + 1, frozen, memory_bytes=5 * ROW)
    dense = ReverseKL()(hidden @ frozen.T, (hidden + 1) @ frozen.T)
    found = torch.autograd.grad(upstream(values), hidden)
    torch.testing.assert_close(found, torch.autograd.grad(upstream(dense), hidden))
    assert not chunked_divergence(ReverseKL(), hidden.detach(), frozen, hidden + 1, frozen).requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"teacher": torch.zeros(4, 3)},
            r"student_hidden are \[5, 3\] and teacher_hidden \[4, 3\].*hidden\[mask\]",
        ),
        ({"student_hidden": torch.zeros(1, 5, 3)}, r"\[1, 5, 3\].*\[N, H_s\]"),
        ({"student_hidden": torch.zeros(5, 3, dtype=torch.long)}, "student_hidden are torch.int64, not floating point"),
        ({"teacher": torch.zeros(5, 3, device="meta")}, "on cpu and teacher_hidden on meta"),
        ({"teacher_head": torch.zeros(8, 4)}, r"hidden states are \[5, 3\] and the head's matrix \[8, 4\]"),
        ({"teacher_head": None}, "give teacher_head"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"memory_bytes": 0}, "memory_bytes is 0"),
        ({"weights": torch.ones(4)}, r"5 student states, but weights \[4\]: give \[N\]"),
        ({"weights": torch.ones(5, device="meta")}, "on cpu and weights on meta"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {
        "student_hidden": torch.zeros(5, 3),
        "student_head": torch.zeros(8, 3),
        "teacher": torch.zeros(5, 3),
        "teacher_head": torch.zeros(8, 3),
    }
    with pytest.raises(ValueError, match=message):
        chunked_divergence(ReverseKL(), **{**arguments, **changes})


def test_a_function_that_reduces_is_refused() -> None:
    hidden, matrix = torch.zeros(5, 3), torch.zeros(8, 3)
    with pytest.raises(ValueError, match=r"function returned \[\] for 5 tokens; it must return \[n\]"):
        chunked(lambda s, t: (ReverseKL().from_log_probs(s, t).mean(),), hidden, matrix, hidden, matrix)
