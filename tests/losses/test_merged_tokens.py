"""Several tokens as one outcome: values and gradients against the definition in float64, over summed probabilities."""

import pytest
import torch
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, Head, Mixture, ReverseKL, SkewKL, SkewReverseKL, TopK, chunked
from opcd.losses.chunking import LIVE
from tests.helpers.loss_reference import random_pair

N, V, H_S, H_T = 13, 40, 6, 10
ENDS = torch.tensor([7, 3, 21])
TEMPERATURE = 0.7


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def definition(divergence: Divergence, s: Tensor, t: Tensor) -> Tensor:
    """The divergence from the probabilities of both models, [n, V] x2 -> [n]."""
    match divergence:
        case ForwardKL():
            return kl(t, s)
        case ReverseKL():
            return kl(s, t)
        case JSD(beta=beta):
            mixed = beta * t + (1 - beta) * s
            return beta * kl(t, mixed) + (1 - beta) * kl(s, mixed)
        case SkewKL(alpha=alpha):
            return kl(t, alpha * t + (1 - alpha) * s)
        case SkewReverseKL(alpha=alpha):
            return kl(s, alpha * s + (1 - alpha) * t)
        case Mixture(divergences=divergences, weights=weights):
            return sum(w * definition(d, s, t) for w, d in zip(weights, divergences, strict=True))
        case TopK(inner=inner, k=k):  # of the student, with a bucket
            best = s.topk(k).indices
            both = [torch.cat([p.gather(-1, best), 1 - p.gather(-1, best).sum(-1, keepdim=True)], -1) for p in (s, t)]
            return definition(inner, *both)
    raise TypeError(divergence)


def merged(logits: Tensor) -> Tensor:
    """The probabilities of the other tokens, and one of the ends together: [n, V] -> [n, V - 2]."""
    p = (logits / TEMPERATURE).softmax(-1)
    others = [token for token in range(V) if token not in ENDS]
    return torch.cat([p[:, others], p[:, ENDS].sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("memory_bytes", [5 * 4 * V * LIVE, 10**9])
@pytest.mark.parametrize("head", ["matrix", "bias, soft-capped", "function", "padded"])
@pytest.mark.parametrize(
    "divergence",
    [
        *(ForwardKL(), ReverseKL(), JSD(0.3), SkewKL(0.2), SkewReverseKL(0.2), TopK(ReverseKL(), k=5)),
        Mixture([ForwardKL(), ReverseKL()], [0.3, 0.7]),
    ],
    ids=repr,
)
def test_values_and_gradients_are_those_of_the_summed_probabilities(divergence, head, memory_bytes):
    pairs = [random_pair(*shape, seed=seed) for seed, shape in enumerate([(N, H_S), (V, H_S), (N, H_T), (V, H_T)])]
    hidden, matrix = (pair[0].requires_grad_() for pair in pairs[:2])
    teacher_hidden, teacher_matrix = (pair[0] for pair in pairs[2:])
    bias, padding = random_pair(V)[0].requires_grad_(), torch.full((4, H_S), 9.0, dtype=torch.float64)
    heads = {
        "matrix": (Head(matrix), lambda h: h @ matrix.T),
        "bias, soft-capped": (Head(matrix, bias, softcap=5.0), lambda h: 5 * torch.tanh((h @ matrix.T + bias) / 5)),
        "function": (Head(lambda h: h @ matrix.T), lambda h: h @ matrix.T),
        "padded": (Head(lambda h: h @ torch.cat([matrix, padding]).T), lambda h: h @ matrix.T),
    }
    ours, dense = heads[head]
    weights = torch.linspace(0.1, 1.0, N, dtype=torch.float64)
    (values,) = chunked(
        lambda s, t: (divergence.from_log_probs(s, t),),
        *(hidden, ours, teacher_hidden, teacher_matrix),
        weights=weights,
        temperature=TEMPERATURE,
        merged_tokens=ENDS,
        memory_bytes=memory_bytes,
    )
    expected = definition(divergence, merged(dense(hidden)), merged(teacher_hidden @ teacher_matrix.T))
    torch.testing.assert_close(values, expected)
    inputs = [hidden, matrix, *([bias] if "bias" in head else [])]
    found = torch.autograd.grad((values * weights).sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad((expected * weights).sum(), inputs))


def test_models_that_differ_in_their_end_token_only_agree():
    """One ends with token 3 and the other with token 7, for sure: unmerged, that is the largest disagreement."""
    logits = random_pair(1, V)[0].float()
    student, teacher = logits.clone(), logits.clone()
    student[:, 3], teacher[:, 7] = 60.0, 60.0
    student[:, 7], teacher[:, 3] = -60.0, -60.0
    states = torch.ones(1, 1)

    def compare(**options):
        run = lambda s, t: (ReverseKL().from_log_probs(s, t), s.argmax(-1).float(), t.argmax(-1).float())  # noqa: E731
        return chunked(run, states, student.T.contiguous(), states, teacher.T.contiguous(), **options)

    apart, together = compare(), compare(merged_tokens=torch.tensor([3, 7]))
    assert float(apart[0]) == pytest.approx(120.0, rel=1e-4) and apart[1] != apart[2]
    assert float(together[0]) == pytest.approx(0.0, abs=1e-6) and together[1] == together[2] == 3
