"""Any divergence on the k likeliest tokens of a position, with three ways to treat the rest of the vocabulary.

How it works: choose the tokens (``support``) from the two full distributions, take both models' log-probabilities of
them, treat the remaining mass (``tail``), and give the result to the inner divergence. The choice has no gradient. The
log-probabilities do, and are normalised over the whole vocabulary.
"""

import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from opcd.losses._kernels import blocks
from opcd.losses.divergences import Divergence, Known
from opcd.losses.log_probs import NEVER, at_least_float32, log_total

Support = Literal["student", "teacher", "union", "intersection"]
Tail = Literal["bucket", "renormalize", "drop"]


class TopK(Divergence):
    """``inner`` on the k likeliest tokens of ``support``; with k ≥ V exactly ``inner``, whatever the tail.

    Args:
        inner: the divergence on the chosen tokens.
        k: the number of tokens to choose, at least 1; more than the vocabulary has means all of it.
        support: whose likeliest tokens: the student's, the teacher's, those of either (``union``, up to 2k) or those of
            both (``intersection``, possibly none).
        tail: ``bucket`` joins all other tokens into one more outcome: a divergence, at most ``inner`` on the whole
            vocabulary. ``renormalize`` makes the chosen tokens sum to one and ignores all other mass. ``drop`` leaves
            the terms of the other tokens out of the sum, without renormalizing: the paper's code does so (k = 256 of
            the student), but the result is not a divergence and can be negative.

    Raises:
        ValueError: k < 1, an unknown support or tail, a TopK inside a TopK, or ``renormalize`` over at most one token,
            which is zero for every pair of models.
    """

    def __init__(self, inner: Divergence, k: int = 256, support: Support = "student", tail: Tail = "bucket") -> None:
        _check_choice(inner, k, support, tail)
        if tail == "drop":
            warnings.warn(
                "tail='drop' is not a divergence: it can be negative, and is minimised by moving mass off the "
                "support. It is what the paper's code does with k=256 of the student; watch retained_mass with it, or "
                "use tail='bucket'",
                UserWarning,
                stacklevel=2,
            )
        self.inner = inner
        self.k = k
        self.support: Support = support
        self.tail: Tail = tail

    @property
    def needs(self) -> Known:
        """The teacher's likeliest tokens with its own support, else the whole distribution."""
        return "topk" if self.support == "teacher" else "distribution"

    def values(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The divergence, and both models' mass on the support."""
        names = ("divergence", "student_retained_mass", "teacher_retained_mass")
        return dict(zip(names, self.with_retained_mass(student, teacher), strict=True))

    def from_log_probs(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """``inner`` on the support and its tail, [..., V] x2 -> [...]; 0 at positions where the support is empty."""
        return self.with_retained_mass(student_log_probs, teacher_log_probs)[0]

    def with_retained_mass(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The divergence and the student's and the teacher's mass on the support, [..., V] x2 -> [...] x3.

        The masses are probabilities, 0 to 1, without gradient.
        """
        if self.k >= student_log_probs.shape[-1]:
            value = self.inner.from_log_probs(student_log_probs, teacher_log_probs)
            return value, torch.ones_like(value), torch.ones_like(value)
        tokens = self._tokens(student_log_probs, teacher_log_probs)
        student, teacher = self._reduce(student_log_probs, tokens), self._reduce(teacher_log_probs, tokens)
        value = self.inner.from_log_probs(student, teacher)
        both = (student_log_probs.detach(), teacher_log_probs.detach())
        student_mass, teacher_mass = (_gather(log_p, tokens).exp().sum(-1) for log_p in both)
        return value, student_mass, teacher_mass

    def values_of_record(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The divergence from the teacher's recorded likeliest tokens: [..., V], ids and log p_T [..., n] -> [...].

        The teacher's mass off the record is one minus the recorded mass, exact to float32's rounding of 1.
        """
        if tokens.shape[-1] > self.k:
            best = log_probs.topk(self.k).indices
            tokens, log_probs = tokens.gather(-1, best), log_probs.gather(-1, best)
        teacher = at_least_float32(log_probs)
        if self.tail == "bucket":
            rest = torch.log1p(-teacher.exp().sum(-1).clamp(max=1.0))
            teacher = torch.cat([teacher, rest[..., None]], dim=-1)
        elif self.tail == "renormalize":
            teacher = teacher - log_total(teacher)[..., None]
        return {"divergence": self.inner.from_log_probs(self._reduce(student, tokens), teacher)}

    def check_record(self, recorded: int) -> None:
        """Raise ``ValueError`` unless `values_of_record` works with so many recorded tokens a position."""
        if self.support != "teacher":
            raise ValueError(
                f"support={self.support!r} needs the teacher's probability of tokens that the record does not hold; "
                "use TopK(..., support='teacher')"
            )
        if recorded < self.k:
            raise ValueError(f"k is {self.k}, but the record holds {recorded} tokens a position; use k={recorded}")

    def _tokens(self, student_log_probs: Tensor, teacher_log_probs: Tensor) -> Tensor:
        """The ids of the support, [..., n], each once; the id V, which is no token, fills unused places."""
        vocabulary = student_log_probs.shape[-1]
        if self.support == "student":
            return student_log_probs.topk(self.k).indices
        teachers = teacher_log_probs.topk(self.k).indices
        if self.support == "teacher":
            return teachers
        students = student_log_probs.topk(self.k).indices
        shared = _members(students, vocabulary).gather(-1, teachers)
        if self.support == "intersection":
            return teachers.masked_fill(~shared, vocabulary)
        return torch.cat([students, teachers.masked_fill(shared, vocabulary)], dim=-1)

    def _reduce(self, log_p: Tensor, tokens: Tensor) -> Tensor:
        """One model's log-probabilities of the outcomes that ``inner`` compares, [..., V] -> [..., n or n + 1]."""
        if self.tail == "bucket":
            kept, rest = _Split.apply(log_p, tokens)  # type: ignore[no-untyped-call]
            return torch.cat([kept, rest[..., None]], dim=-1)
        kept = _gather(log_p, tokens)
        if self.tail == "renormalize":
            total = log_total(kept)[..., None]
            return kept - total.masked_fill(total == NEVER, 0.0)  # an empty support gives -inf, not NaN
        return kept


class _Split(torch.autograd.Function):
    """Log-probabilities of the tokens, and the log of the mass on all others: [..., V], [..., n] -> [..., n], [...].

    The mass is a sum over the others: one minus the tokens' mass would lose its digits, as that is mostly near one.
    The backward pass makes one tensor [..., V], the gradient; autograd would make two for each result.
    """

    @staticmethod
    def forward(ctx: Any, log_p: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        rest = log_p.new_empty(log_p.shape[:-1])
        for mass, values, ids in blocks(rest, log_p, tokens):
            mass[:] = _without(values.clone(), ids, NEVER).logsumexp(-1)
        ctx.save_for_backward(log_p, tokens, rest)
        return _gather(log_p, tokens), rest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, kept_upstream: Tensor, rest_upstream: Tensor) -> tuple[Tensor, None]:
        log_p, tokens, rest = ctx.saved_tensors
        empty, vocabulary = rest == NEVER, log_p.shape[-1]
        rest, rest_upstream = rest.masked_fill(empty, 0.0), rest_upstream.masked_fill(empty, 0.0)
        kept_upstream = kept_upstream.masked_fill(tokens == vocabulary, 0.0)
        gradient = torch.empty_like(log_p, memory_format=torch.contiguous_format)
        for mass, values, room, ids, of_rest in blocks(rest, log_p, gradient, tokens, rest_upstream[..., None]):
            share = torch.sub(values, mass[:, None], out=room).exp_().mul_(of_rest)
            _without(share, ids, 0.0)
        return gradient.scatter_add_(-1, tokens.clamp(max=vocabulary - 1), kept_upstream), None


def _gather(log_p: Tensor, tokens: Tensor) -> Tensor:
    """The log-probabilities of the tokens, [..., V] and [..., n] -> [..., n]; ``NEVER`` where the id is V."""
    vocabulary = log_p.shape[-1]
    return log_p.gather(-1, tokens.clamp(max=vocabulary - 1)).masked_fill(tokens == vocabulary, NEVER)


def _without(values: Tensor, tokens: Tensor, fill: float) -> Tensor:
    """The values with `fill` at the tokens, written over them: [n, V] and ids [n, m] -> [n, V]; the id V is ignored."""
    vocabulary = values.shape[-1]
    tokens = torch.where(tokens == vocabulary, tokens.amin(-1, keepdim=True), tokens)  # repeat an id
    places = tokens.clamp(max=vocabulary - 1)  # a row without any token: write the value that is there
    return values.scatter_(-1, places, torch.where(tokens < vocabulary, fill, values.gather(-1, places)))


def _members(tokens: Tensor, vocabulary: int) -> Tensor:
    """Whether each token of the vocabulary is among the ids, [..., n] -> [..., V]; the id V is ignored."""
    one_more = torch.zeros(*tokens.shape[:-1], vocabulary + 1, dtype=torch.bool, device=tokens.device)
    return one_more.scatter_(-1, tokens, True)[..., :vocabulary]


def _check_choice(inner: Divergence, k: int, support: str, tail: str) -> None:
    if isinstance(inner, TopK):
        raise ValueError("inner is a TopK already; give the divergence inside it, with one k, support and tail")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1 token")
    if support not in get_args(Support):
        raise ValueError(f"support is {support!r}; choose one of {', '.join(get_args(Support))}")
    if tail not in get_args(Tail):
        raise ValueError(f"tail is {tail!r}; choose one of {', '.join(get_args(Tail))}")
    if tail == "renormalize" and k == 1 and support != "union":
        raise ValueError(
            "tail='renormalize' with k=1 gives the one token probability 1 in both models: the loss is zero for every "
            "pair of models and teaches nothing. Use tail='bucket', or k >= 2"
        )
