"""A recorded teacher gives what the live one gives, or says what it cannot give."""

import pytest
import torch

from opcd.losses import (
    Divergence,
    Mixture,
    RecordedTokens,
    RecordedTopK,
    ReverseKL,
    SampledReverseKL,
    TopK,
    chunked_divergence,
)
from opcd.losses.chunking import LIVE
from tests.helpers.loss_reference import DIVERGENCES, random_pair

N, V, H = 11, 30, 5


@pytest.fixture
def sides():
    """The student's hidden states and matrix with gradient, the teacher's log-probabilities: float64."""
    hidden, matrix = (random_pair(*shape, spread=1.0, seed=1)[0].requires_grad_() for shape in ((N, H), (V, H)))
    return hidden, matrix, random_pair(N, V)[1].log_softmax(-1)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "drop"])
@pytest.mark.parametrize("inner", DIVERGENCES, ids=repr)
@pytest.mark.filterwarnings("ignore:tail='drop'")
def test_recorded_top_k_equals_the_live_teacher(sides, inner: Divergence, tail: str) -> None:
    hidden, matrix, teacher = sides
    loss = TopK(inner, 4, "teacher", tail)  # type: ignore[arg-type]
    for recorded in (4, 9):  # the record may hold more than k
        log_probs, tokens = teacher.topk(recorded)
        order = torch.randperm(recorded)  # and in any order
        record = RecordedTopK(tokens[:, order], log_probs[:, order])
        values = chunked_divergence(loss, hidden, matrix, record, memory_bytes=3 * 4 * LIVE * V)
        live = loss(hidden @ matrix.T, teacher)
        torch.testing.assert_close(values, live)
        weights = torch.linspace(-1, 2, N, dtype=torch.float64)
        found = torch.autograd.grad((values * weights).sum(), [hidden, matrix])
        torch.testing.assert_close(found, torch.autograd.grad((live * weights).sum(), [hidden, matrix]))


def test_recorded_tokens_serve_the_sampled_reverse_kl(sides) -> None:
    hidden, matrix, teacher = sides
    tokens = torch.arange(N) % V
    chosen = [log_p.gather(-1, tokens[:, None])[:, 0] for log_p in ((hidden @ matrix.T).log_softmax(-1), teacher)]
    stale = chosen[0].detach() - 0.3
    for loss, rollout in ((SampledReverseKL(), None), (SampledReverseKL(1.2), stale)):
        record = RecordedTokens(tokens, chosen[1], rollout)
        values = chunked_divergence(loss, hidden, matrix, record, memory_bytes=3 * 4 * LIVE * V)
        torch.testing.assert_close(values, loss(*chosen, rollout))
        found = torch.autograd.grad(values.sum(), matrix, retain_graph=True)
        torch.testing.assert_close(found, torch.autograd.grad(loss(*chosen, rollout).sum(), matrix, retain_graph=True))


TOP = RecordedTopK(torch.zeros(N, 1, dtype=torch.long), torch.zeros(N, 1))
ONE = RecordedTokens(torch.zeros(N, dtype=torch.long), torch.zeros(N))


@pytest.mark.parametrize(
    ("loss", "teacher", "options", "message"),
    [
        (ReverseKL(), TOP, {}, "ReverseKL.* cannot be computed from RecordedTopK: .*support='teacher'"),
        (Mixture([ReverseKL(), ReverseKL()], [1, 1]), ONE, {}, "Mixture.* cannot be computed from RecordedTokens"),
        (SampledReverseKL(), TOP, {}, "SampledReverseKL.* cannot be computed from RecordedTopK"),
        (SampledReverseKL(), torch.zeros(N, H), {"teacher_head": torch.zeros(V, H)}, "ReverseKL has the same expected"),
        (TopK(ReverseKL(), 1, "student"), TOP, {}, "support='student' needs"),
        (TopK(ReverseKL(), 5, "teacher"), TOP, {}, "k is 5, but the record holds 1 tokens"),
        (TopK(ReverseKL(), 1, "teacher"), TOP, {"temperature": 0.7}, "temperature other than 1"),
        (TopK(ReverseKL(), 1, "teacher"), TOP, {"teacher_head": torch.zeros(V, H)}, "have no effect on recorded"),
        (SampledReverseKL(), RecordedTokens(ONE.tokens[1:], ONE.log_probs[1:]), {}, "11 student states but 10 rows"),
    ],
)
def test_what_a_record_cannot_give_is_refused(loss, teacher, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        chunked_divergence(loss, torch.zeros(N, H), torch.zeros(V, H), teacher, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RecordedTopK(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3)), r"\[3, 2\].*both \[N, k\]"),
        (lambda: RecordedTopK(torch.zeros(3, 2), torch.zeros(3, 2)), "int64 token ids"),
        (lambda: RecordedTopK(torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)), "at most 0: give log softmax"),
        (lambda: RecordedTokens(torch.zeros(3, dtype=torch.long), torch.zeros(3, 1)), r"both \[N\]"),
    ],
)
def test_records_that_are_none_are_refused(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mixture_is_the_weighted_sum() -> None:
    student, teacher = random_pair(4, V)
    parts = [*DIVERGENCES, TopK(ReverseKL(), 3)]
    weights = [0.5 + number for number in range(len(parts))]
    values = Mixture(parts, weights)(student, teacher, temperature=0.7)
    dense = sum(w * part(student, teacher, temperature=0.7) for w, part in zip(weights, parts, strict=True))
    torch.testing.assert_close(values, dense)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([ReverseKL()], [1.0], "two or more"),
        ([ReverseKL()] * 2, [1.0], "as many weights"),
        ([ReverseKL()] * 2, [1, 0], "a weight of the Mixture is 0"),
    ],
)
def test_a_mixture_that_mixes_nothing_is_refused(parts, weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture(parts, weights)
