"""Divergences in float64 straight from their definitions, one row at a time in plain Python, with gradients by hand.

For a divergence D(p_S) with p_S = softmax(z), dD/dz_v = w_v − p_v Σ w with w_v = p_v ∂D/∂p_v.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL, SkewKL, SkewReverseKL

DIVERGENCES: list[Divergence] = [
    ForwardKL(),
    ReverseKL(),
    JSD(0.1),
    JSD(0.5),
    JSD(0.9),
    SkewKL(0.1),
    SkewKL(0.7),
    SkewReverseKL(0.1),
    SkewReverseKL(0.7),
]


def softmax(logits: list[float]) -> tuple[list[float], list[float]]:
    """(probabilities, log-probabilities)."""
    top = max(logits)
    log_total = math.log(math.fsum(math.exp(x - top) for x in logits))
    logs = [x - top - log_total for x in logits]
    return [math.exp(x) for x in logs], logs


def divide(p: float, log_p: float, q: float, log_q: float) -> float:
    """log(p / q), where p > 0: from the logs, which do not underflow; +inf where q = 0."""
    return log_p - log_q


def mix(a: float, log_a: float, b: float, log_b: float, weight: float) -> float:
    """log(weight · a + (1 − weight) · b), finite as long as one of the two is."""
    top = max(log_a, log_b)
    if top == -math.inf:
        return top
    return top + math.log(weight * math.exp(log_a - top) + (1 - weight) * math.exp(log_b - top))


def term(divergence: Divergence, ps: float, ls: float, pt: float, lt: float) -> tuple[float, float]:
    """One token's (term of the sum, p_S · ∂D/∂p_S); ls and lt are the logs of ps and pt."""
    match divergence:
        case ForwardKL():
            return (pt * (lt - ls) if pt > 0 else 0.0), -pt
        case ReverseKL():
            log_ratio = ls - lt if ps > 0 else 0.0
            return (ps * log_ratio if ps > 0 else 0.0), (ps * (log_ratio + 1) if ps > 0 else 0.0)
        case JSD(beta=beta):
            lm = mix(pt, lt, ps, ls, beta)
            students = ps * (ls - lm) if ps > 0 else 0.0
            return (beta * pt * (lt - lm) if pt > 0 else 0.0) + (1 - beta) * students, (1 - beta) * students
        case SkewKL(alpha=alpha):
            lm = mix(pt, lt, ps, ls, alpha)
            weight = -(1 - alpha) * pt * math.exp(ls - lm) if pt > 0 else 0.0
            return (pt * (lt - lm) if pt > 0 else 0.0), weight
        case SkewReverseKL(alpha=alpha):
            lm = mix(ps, ls, pt, lt, alpha)
            if ps == 0:
                return 0.0, 0.0
            return ps * (ls - lm), ps * ((ls - lm) + 1 - alpha * math.exp(ls - lm))
    raise TypeError(divergence)


def reference_row(divergence: Divergence, student: list[float], teacher: list[float]) -> tuple[float, list[float]]:
    """(value, gradient with respect to the student's logits) of one position."""
    (ps, ls), (pt, lt) = softmax(student), softmax(teacher)
    terms = [term(divergence, *token) for token in zip(ps, ls, pt, lt, strict=True)]
    total = math.fsum(weight for _, weight in terms)
    return math.fsum(t for t, _ in terms), [w - p * total for p, (_, w) in zip(ps, terms, strict=True)]


def reference(divergence: Divergence, student_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Values [...] and gradients [..., V] in float64."""
    shape, vocabulary = student_logits.shape, student_logits.shape[-1]
    rows = zip(
        student_logits.reshape(-1, vocabulary).tolist(), teacher_logits.reshape(-1, vocabulary).tolist(), strict=True
    )
    values, gradients = zip(*(reference_row(divergence, s, t) for s, t in rows), strict=True)
    double = torch.float64
    return torch.tensor(values, dtype=double).reshape(shape[:-1]), torch.tensor(gradients, dtype=double).reshape(shape)


def value_and_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """What the code under test gives: values, and the gradient of their sum in the student's logits."""
    student = student.detach().clone().requires_grad_()
    values = loss(student, teacher)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def random_pair(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Tensor, Tensor]:
    """Two sets of logits, normal with the given spread."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(*shape, generator=generator, dtype=torch.float64) * spread for _ in range(2))
    return student.to(dtype), teacher.to(dtype)
