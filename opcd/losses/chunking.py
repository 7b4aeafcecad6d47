"""Any function of both log-probabilities from hidden states and heads, without ever holding the logits of all tokens.

How it works: walk over the tokens in chunks; project a chunk with both heads, compute its values, and throw the logits
away; the backward pass projects each chunk once more (``torch.utils.checkpoint``). Peak memory is that of one chunk,
however many tokens there are.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opcd.losses.checks import check_device, check_floating, check_positive
from opcd.losses.head import Head, Projection, as_head
from opcd.losses.log_probs import log_probs

LogProbsFunction = Callable[..., tuple[Tensor, ...]]
"""(student_log_probs [n, V], teacher_log_probs [n, V] where there is a teacher, then the rows of per_token) -> tensors
[n]; only the first one's gradient is used."""

CHUNK_BYTES = 64 * 2**20
"""The default size of one model's logits of one chunk, in bytes."""


def chunked(
    function: LogProbsFunction,
    student_hidden: Tensor,
    student_head: Head | Projection,
    teacher_hidden: Tensor | None = None,
    teacher_head: Head | Projection | None = None,
    per_token: tuple[Tensor, ...] = (),
    *,
    temperature: float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, ...]:
    """``function`` of both log-probabilities of every token, [N, H_s], [N, H_t] -> a tuple of [N], no [N, V] stored.

    The first result carries a gradient, to ``student_hidden`` and to whatever the student's head holds (matrix, bias,
    adapter). The others are statistics from the same projection, detached; compute them after the first and without
    gradient (as ``log_probs.entropy`` does), and the backward pass does not compute them again. The teacher's side runs
    without gradient.

    Args:
        function: of both log-probabilities [n, V] at the temperature, in float32 (float64 stays float64).
        student_hidden: [N, H_s]; N = 0 is fine.
        student_head: a ``Head``, a matrix [V, H_s], a module or a function.
        teacher_hidden: [N, H_t], on the same device.
        teacher_head: as ``student_head``; both of the teacher's are None where there is no teacher. Where one
            vocabulary is longer, its extra rows are taken for padding: both logits are cut to the shorter length, and
            the softmax runs over the rows that both have.
        per_token: tensors [N, ...] of which ``function`` gets the chunk's rows.
        temperature: divides both logits; positive.
        chunk_bytes: the size of one model's float32 logits [n, V] of a chunk, which sets n (at least 1). The peak is 10
            times that for a KL and 15 for the JSD, in the backward pass. On a CPU stay at 64 MiB or more: glibc's
            allocator fragments on smaller tensors, and the process then grows with N after all.

    Raises:
        ValueError: for hidden states that are not two [N, H] floating-point tensors of one N and one device, a
            temperature or chunk_bytes that is not positive, or a result of ``function`` that is not [n].
    """
    check_positive(temperature, "temperature")
    check_positive(chunk_bytes, "chunk_bytes")
    _check_rows(student_hidden, teacher_hidden, per_token)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("give the teacher's hidden states together with its head, or neither")
    student_head = as_head(student_head)
    teachers = None if teacher_head is None else as_head(teacher_head)
    run = partial(_one_chunk, function, student_head, teachers, temperature)
    if torch.is_grad_enabled():
        run = partial(checkpoint, run, use_reentrant=False)
    rows = max(1, chunk_bytes // (4 * student_head.vocabulary_size(student_hidden)))
    # One split, not a slice a chunk: its backward joins the chunks' gradients once, where slices would add N x H each.
    teacher_side = () if teacher_hidden is None else (teacher_hidden.detach(),)
    parts = zip(*(torch.split(x, rows) for x in (student_hidden, *teacher_side, *per_token)), strict=True)
    results = [run(*part) for part in parts]
    return tuple(torch.cat(result) for result in zip(*results, strict=True))


def _one_chunk(
    function: LogProbsFunction,
    student_head: Head,
    teacher_head: Head | None,
    temperature: float,
    student_hidden: Tensor,
    *rest: Tensor,
) -> tuple[Tensor, ...]:
    """The results for the rows of one chunk, [n, H_s], [n, H_t] -> a tuple of [n], all but the first detached."""
    # The student first: autocast keeps its low-precision copy of a weight, and one made without gradient would
    # (in torch 2.8) serve the student too where both models share the head.
    student = student_head(student_hidden)
    if teacher_head is None:
        first, *statistics = function(log_probs(student, temperature), *rest)
    else:
        with torch.no_grad():
            teacher = teacher_head(rest[0])
        vocabulary = min(student.shape[-1], teacher.shape[-1])
        student = log_probs(student[:, :vocabulary], temperature)  # the same name: the logits can go now
        teacher = log_probs(teacher[:, :vocabulary], temperature)
        first, *statistics = function(student, teacher, *rest[1:])
    for result in (first, *statistics):
        if result.shape != student_hidden.shape[:1]:
            raise ValueError(f"function gave {list(result.shape)} for {len(student_hidden)} tokens; it must give [n]")
    return first, *(statistic.detach() for statistic in statistics)


def _check_rows(student_hidden: Tensor, teacher_hidden: Tensor | None, per_token: tuple[Tensor, ...]) -> None:
    """Refuse hidden states that are not [N, H], floating point, and rows that are not N or on another device."""
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
    for values in per_token:
        if len(values) != len(student_hidden):
            raise ValueError(f"{len(student_hidden)} student states but {len(values)} rows of recorded values")
        check_device(student_hidden, "student_hidden", values, "recorded values")
