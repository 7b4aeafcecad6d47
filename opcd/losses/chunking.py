"""Any function of both models' log-probabilities, from hidden states and heads, without the logits of all tokens.

How it works: go over the tokens in chunks; project a chunk with both heads, compute its values and at once their
gradient, and drop the logits. Peak memory is that of one chunk, however many tokens there are. The gradient of the
heads is a sum over tokens, so the forward pass must know how much each token will count (``weights``). If the backward
pass finds other weights, it goes over the chunks once more.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from opcd.losses._kernels import assuming_finite
from opcd.losses.head import Head, Projection, as_head
from opcd.losses.log_probs import check_device, check_floating, check_positive, log_probs, log_probs_, merge_

LogProbsFunction = Callable[..., tuple[Tensor, ...]]
"""(student_log_probs [n, V], teacher_log_probs [n, V] where there is a teacher, then the rows of per_token) -> tensors
[n]. Only the gradient of the first one is used."""

LIVE = 3
"""The number of float32 tensors [n, V] that live at once in a chunk: both log-probabilities and a gradient."""

MEMORY_BYTES = 560 * 2**20
"""The default of ``memory_bytes`` on a CPU."""

MOST_ROWS = 320
"""The most tokens of a chunk on a CPU. With more, the products take hardly less time per token (docs/log.md)."""

GPU_LIVE = 8
"""The same on a GPU, where no block of rows is smaller than the chunk: 5.3 for a KL, 8.3 for JSD (docs/log.md)."""

GPU_MEMORY_SHARE = 1 / 10
"""The default of ``memory_bytes`` on a GPU, as a share of all its memory: a share of what is free would change the
chunks, and with them the rounding, from step to step."""

GPU_MEMORY = 80 * 2**30
"""The memory of a GPU that does not tell it."""

GPU_MOST_ROWS = 4096
"""The most tokens of a chunk on a GPU. Its products need about 2,048 rows for their full rate (not measured)."""


def chunked(
    function: LogProbsFunction,
    student_hidden: Tensor,
    student_head: Head | Projection,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | Projection | None = None,
    per_token: tuple[Tensor, ...] = (),
    *,
    weights: Tensor | None = None,
    temperature: float = 1.0,
    merged_tokens: Tensor | None = None,
    memory_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """``function`` of both log-probabilities of every token, [N, H_s], [N, H_t] -> a tuple of [N], no [N, V] stored.

    The first result has a gradient to ``student_hidden`` and to the parameters of the student's head (matrix, bias,
    adapter). The others are statistics of the same projection, without gradient. The teacher gets no gradient.

    Args:
        function: of both log-probabilities [n, V] at the temperature, in float32 (float64 stays float64). It must not
            keep them: the next chunk reuses their memory.
        student_hidden: [N, H_s]; N = 0 is allowed.
        student_head: a ``Head``, a matrix [V, H_s], a module or a function.
        teacher_hidden: [N, H_t], on the same device.
        teacher_head: as ``student_head``. Both of the teacher's are None where there is no teacher. If one vocabulary
            is longer, its extra rows are taken for padding: both logits are cut to the shorter length before the
            softmax.
        per_token: tensors [N, ...]; ``function`` gets the chunk's rows of each.
        weights: [N], how much each token counts in the loss, up to a factor: ``mask / mask.sum()`` for a masked mean.
            None: all count the same, as in ``values.mean()``. The weights change no result: a backward pass with other
            weights is as exact, and costs a second pass over the chunks.
        temperature: divides both logits; positive.
        merged_tokens: [m] ids that count as one outcome in both distributions, such as several end-of-sequence tokens:
            the first id has the sum of their probabilities, the others have probability 0.
        memory_bytes: about the most memory of one chunk beside the gradients; sets the tokens per chunk (at least 1).
            None: 560 MiB on a CPU, a tenth of all its memory on a GPU. On a CPU use the default or more: glibc
            keeps and fragments blocks under 32 MiB, so smaller chunks may take more memory.

    Raises:
        ValueError: the hidden states are not [N, H] floating-point tensors of one N and one device, weights are not
            [N], temperature or memory_bytes is not positive, or a result of ``function`` is not [n].
    """
    check_positive(temperature, "temperature")
    if memory_bytes is not None:
        check_positive(memory_bytes, "memory_bytes")
    _check_rows(student_hidden, teacher_hidden, per_token, weights)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("give the teacher's hidden states together with its head, or neither")
    student_head = as_head(student_head)
    teachers = None if teacher_head is None else as_head(teacher_head)
    same = (teachers, temperature, merged_tokens)
    teacher_side = () if teacher_hidden is None else (teacher_hidden.detach(),)
    training = torch.is_grad_enabled()
    chunks = _Chunks(
        lambda sums: partial(_one_chunk, function, student_head.accumulating(sums), *same),
        rows=rows_of(student_hidden.device, student_head.vocabulary_size(student_hidden), memory_bytes),
        inputs=(student_hidden, *teacher_side, *per_token),
        leaves=student_head.trainable(student_hidden) if training else [],
        retain_graph=student_head.is_function,
    )
    return _with_gradient(chunks, weights) if training else _exactly(chunks.values, student_hidden.device)


def rows_of(device: torch.device, vocabulary: int, memory_bytes: int | None = None, memory: int | None = None) -> int:
    """The tokens of a chunk on a device, at least 1.

    Args:
        device: where the hidden states are.
        vocabulary: V.
        memory_bytes: as for `chunked`.
        memory: bytes of a GPU; None: those of this machine's.
    """
    if device.type == "cpu":
        most, live, default = MOST_ROWS, LIVE, MEMORY_BYTES
    else:
        most, live, default = GPU_MOST_ROWS, GPU_LIVE, int(GPU_MEMORY_SHARE * (memory or _memory_of(device)))
    return max(1, min(most, (memory_bytes or default) // (4 * live * vocabulary)))


def _memory_of(device: torch.device) -> int:
    here = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).total_memory if here else GPU_MEMORY


Result = TypeVar("Result")


def _exactly(run: Callable[[], Result], device: torch.device) -> Result:
    """The result of a run over all chunks, repeated with masks for probabilities of zero if it met one on a GPU."""
    if device.type == "cpu":  # looks at each chunk
        return run()
    again = _conditions(device)
    with assuming_finite() as sums:
        result = run()
    if not sums.failed:
        return result
    with again():
        return run()


def _one_chunk(
    function: LogProbsFunction,
    student_head: Head,
    teacher_head: Head | None,
    temperature: float,
    merged: Tensor | None,
    student_hidden: Tensor,
    *rest: Tensor,
) -> tuple[Tensor, ...]:
    """The results for the rows of one chunk, [n, H_s], [n, H_t] -> a tuple of [n], all but the first detached."""
    # The student first: autocast caches its low-precision copy of a weight. A copy made without gradient would
    # (in torch 2.8) be used for the student too where both models share the head.
    student = student_head(student_hidden)
    if teacher_head is None:
        first, *statistics = function(_log_probs(student_head, student, student.shape[-1], temperature, merged), *rest)
    else:
        with torch.no_grad():
            teacher = teacher_head(rest[0])
        vocabulary = min(student.shape[-1], teacher.shape[-1])
        student = _log_probs(student_head, student, vocabulary, temperature, merged)  # the same name frees the logits
        teacher = _log_probs(teacher_head, teacher, vocabulary, temperature, merged)
        first, *statistics = function(student, teacher, *rest[1:])
    for result in (first, *statistics):
        if result.shape != student_hidden.shape[:1]:
            raise ValueError(
                f"function returned {list(result.shape)} for {len(student_hidden)} tokens; it must return [n]"
            )
    return first, *(statistic.detach().clone() for statistic in statistics)


def _log_probs(head: Head, logits: Tensor, vocabulary: int, temperature: float, merged: Tensor | None) -> Tensor:
    """The log-probabilities over the first ``vocabulary`` tokens, in the memory of the logits where possible."""
    if head.is_plain and logits.shape[-1] == vocabulary:
        return log_probs_(logits if merged is None else merge_(logits, merged, temperature), temperature)
    logits = logits[:, :vocabulary]
    return log_probs(logits if merged is None else merge_(logits.clone(), merged, temperature), temperature)


def _check_rows(
    student_hidden: Tensor, teacher_hidden: Tensor | None, per_token: tuple[Tensor, ...], weights: Tensor | None
) -> None:
    check_floating(student_hidden, "student_hidden")
    if student_hidden.dim() != 2:
        raise ValueError(
            f"student_hidden are {list(student_hidden.shape)}; they must be [N, H_s]: select the N response tokens "
            "first, e.g. hidden[mask]"
        )
    if teacher_hidden is not None:
        check_floating(teacher_hidden, "teacher_hidden")
        if teacher_hidden.dim() != 2 or len(student_hidden) != len(teacher_hidden):
            raise ValueError(
                f"student_hidden are {list(student_hidden.shape)} and teacher_hidden {list(teacher_hidden.shape)}; "
                "they must be [N, H_s] and [N, H_t]: select the N response tokens first, e.g. hidden[mask]"
            )
        check_device(student_hidden, "student_hidden", teacher_hidden, "teacher_hidden")
    if weights is not None:
        if weights.shape != student_hidden.shape[:1]:
            raise ValueError(f"{len(student_hidden)} student states, but weights {list(weights.shape)}: give [N]")
        check_device(student_hidden, "student_hidden", weights, "weights")
    for values in per_token:
        if len(values) != len(student_hidden):
            raise ValueError(f"{len(student_hidden)} student states but {len(values)} rows of recorded values")
        check_device(student_hidden, "student_hidden", values, "recorded values")


@dataclass(frozen=True, eq=False)
class _Chunks:
    """A function of ``rows`` rows of the inputs at a time. Only the first input and the leaves get a gradient."""

    function: Callable[[list[Tensor]], Callable[..., tuple[Tensor, ...]]]
    """Sums, one of each leaf's shape -> a function of tensors [n, ...] that gives tensors [n], the first with a
    gradient. Its backward pass may add a leaf's gradient to the sum itself; autograd then gives None for that leaf."""
    rows: int
    inputs: tuple[Tensor, ...]
    """Tensors [N, ...]."""
    leaves: list[Tensor]
    """The trained tensors that the function closes over."""
    retain_graph: bool
    """Whether chunks share a part of the graph, beyond the leaves."""

    def values(self) -> tuple[Tensor, ...]:
        """The results without gradient, a tuple of [N]."""
        one_chunk = self.function([])
        results = [one_chunk(*part) for part in self._parts()]
        return tuple(torch.cat(result) for result in zip(*results, strict=True))

    def gradients(self, weights: Tensor) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """The values, and the gradient of ``(weights * values[0]).sum()`` to the first input and to the leaves."""
        of_input, sums = torch.empty_like(self.inputs[0]), [torch.zeros_like(leaf) for leaf in self.leaves]
        one_chunk, results = self.function(sums), []
        for part, weight, room in zip(self._parts(), weights.split(self.rows), of_input.split(self.rows), strict=True):
            first = part[0].detach().requires_grad_()
            with torch.enable_grad():
                value, *others = one_chunk(first, *part[1:])
            gradient, *found = torch.autograd.grad(
                value, [first, *self.leaves], weight.to(value), retain_graph=self.retain_graph, allow_unused=True
            )
            room.copy_(gradient)
            for total, of_chunk in zip(sums, found, strict=True):
                if of_chunk is not None:
                    total.add_(of_chunk)
            results.append((value.detach(), *others))
        values = tuple(torch.cat(result) for result in zip(*results, strict=True))
        return values, [of_input, *sums]

    def _parts(self) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(torch.split(x, self.rows) for x in self.inputs), strict=True)


def _with_gradient(chunks: _Chunks, weights: Tensor | None) -> tuple[Tensor, ...]:
    """The results, a tuple of [N], the first with a gradient to the first input and the leaves."""
    hidden = chunks.inputs[0]
    weights = torch.ones(len(hidden), device=hidden.device) if weights is None else weights.detach()
    return _WithGradient.apply(chunks, weights, hidden, *chunks.leaves)  # type: ignore[no-any-return, no-untyped-call]


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, chunks: _Chunks, weights: Tensor, hidden: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        ctx.chunks, ctx.weights, ctx.same_conditions = chunks, weights, _conditions(hidden.device)
        values, ctx.gradients = _exactly(partial(chunks.gradients, weights), hidden.device)
        ctx.mark_non_differentiable(*values[1:])
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        # Drop the reference: a tensor without other references becomes a parameter's .grad without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        factor = _factor(upstream, ctx.weights.to(upstream))
        if gradients is None or factor is None:
            gradients = None
            with ctx.same_conditions():
                _, gradients = _exactly(partial(ctx.chunks.gradients, upstream), upstream.device)
        elif factor != 1.0:
            gradients = [gradient.mul_(factor) for gradient in gradients]
        return None, None, *gradients


def _factor(upstream: Tensor, weights: Tensor) -> float | None:
    """The c with upstream = c * weights up to rounding, [N] x2; None if there is none."""
    if torch.equal(upstream, weights):  # without tokens too
        return 1.0
    largest = weights.abs().argmax()
    factor = upstream[largest] / weights[largest]
    close = torch.allclose(upstream, factor * weights, rtol=4 * torch.finfo(upstream.dtype).eps, atol=0.0)
    return float(factor) if close else None


def _conditions(device: torch.device) -> Callable[[], Any]:
    """A context manager that restores the autocast setting and the random state of this moment."""
    kind = device.type
    autocast = (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state(device) if kind == "cuda" else None

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng([device] if gpu is not None else []):
            torch.set_rng_state(cpu)
            if gpu is not None:
                torch.cuda.set_rng_state(gpu, device)
            with torch.autocast(kind, autocast[0], enabled=autocast[1]):
                yield

    return again
