"""Any function of both log-probabilities from hidden states and heads, without ever holding the logits of all tokens.

How it works: walk over the tokens in chunks; project a chunk with both heads, compute its values and at once their
gradient, and throw the logits away. Peak memory is that of one chunk, however many tokens there are. The gradient in
the heads is a sum over tokens, so the walk must know how much each of them will count (``weights``): where the backward
pass finds that they count otherwise, it walks once more.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from opcd.losses._chunked_autograd import Walk, with_gradient
from opcd.losses._validation import check_device, check_floating, check_positive
from opcd.losses.head import Head, Projection, as_head
from opcd.losses.log_probs import log_probs, log_probs_

LogProbsFunction = Callable[..., tuple[Tensor, ...]]
"""(student_log_probs [n, V], teacher_log_probs [n, V] where there is a teacher, then the rows of per_token) -> tensors
[n]; only the first one's gradient is used."""

MEMORY_BYTES = 560 * 2**20
"""The default of ``memory_bytes``."""

LIVE = 3
"""How many tensors [n, V] in float32 live at once in a chunk: both log-probabilities and a gradient."""

MOST_ROWS = 320
"""The most tokens of a chunk: with more of them its products take hardly less time a token (docs/log.md)."""


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
    memory_bytes: int = MEMORY_BYTES,
) -> tuple[Tensor, ...]:
    """``function`` of both log-probabilities of every token, [N, H_s], [N, H_t] -> a tuple of [N], no [N, V] stored.

    The first result carries a gradient, to ``student_hidden`` and to whatever the student's head holds (matrix, bias,
    adapter). The others are statistics from the same projection, detached. The teacher's side runs without gradient.

    Args:
        function: of both log-probabilities [n, V] at the temperature, in float32 (float64 stays float64). It must not
            keep them: their memory serves the next chunk.
        student_hidden: [N, H_s]; N = 0 is fine.
        student_head: a ``Head``, a matrix [V, H_s], a module or a function.
        teacher_hidden: [N, H_t], on the same device.
        teacher_head: as ``student_head``; both of the teacher's are None where there is no teacher. Where one
            vocabulary is longer, its extra rows are taken for padding: both logits are cut to the shorter length, and
            the softmax runs over the rows that both have.
        per_token: tensors [N, ...] of which ``function`` gets the chunk's rows.
        weights: [N], how much each token counts in the loss, up to a factor: ``mask / mask.sum()`` for a masked mean.
            None: all the same, as in ``values.mean()``. It changes no result: a gradient that asks for other weights
            is as exact, and costs a second pass.
        temperature: divides both logits; positive.
        memory_bytes: about the most that one chunk may take beside the gradients; it sets how many tokens a chunk has
            (at least 1). On a CPU stay at the default or more: glibc's allocator keeps and fragments blocks under
            32 MiB, and the process may then take more than with a larger chunk.

    Raises:
        ValueError: for hidden states that are not two [N, H] floating-point tensors of one N and one device, weights
            that are not [N], a temperature or memory_bytes that is not positive, or a result of ``function`` that is
            not [n].
    """
    check_positive(temperature, "temperature")
    check_positive(memory_bytes, "memory_bytes")
    _check_rows(student_hidden, teacher_hidden, per_token, weights)
    if (teacher_hidden is None) != (teacher_head is None):
        raise ValueError("give the teacher's hidden states together with its head, or neither")
    student_head = as_head(student_head)
    teachers = None if teacher_head is None else as_head(teacher_head)
    teacher_side = () if teacher_hidden is None else (teacher_hidden.detach(),)
    training = torch.is_grad_enabled()
    walk = Walk(
        lambda sums: partial(_one_chunk, function, student_head.accumulating(sums), teachers, temperature),
        rows=max(1, min(MOST_ROWS, memory_bytes // (4 * LIVE * student_head.vocabulary_size(student_hidden)))),
        inputs=(student_hidden, *teacher_side, *per_token),
        leaves=student_head.trainable(student_hidden) if training else [],
        retain_graph=student_head.is_function,
    )
    return with_gradient(walk, weights) if training else walk.values()


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
        first, *statistics = function(_log_probs(student_head, student, student.shape[-1], temperature), *rest)
    else:
        with torch.no_grad():
            teacher = teacher_head(rest[0])
        vocabulary = min(student.shape[-1], teacher.shape[-1])
        student = _log_probs(student_head, student, vocabulary, temperature)  # the same name: the logits can go now
        teacher = _log_probs(teacher_head, teacher, vocabulary, temperature)
        first, *statistics = function(student, teacher, *rest[1:])
    for result in (first, *statistics):
        if result.shape != student_hidden.shape[:1]:
            raise ValueError(f"function gave {list(result.shape)} for {len(student_hidden)} tokens; it must give [n]")
    return first, *(statistic.detach().clone() for statistic in statistics)


def _log_probs(head: Head, logits: Tensor, vocabulary: int, temperature: float) -> Tensor:
    """The log-probabilities of the first tokens of a vocabulary; where they can be, in the memory of the logits."""
    if head.is_plain and logits.shape[-1] == vocabulary:
        return log_probs_(logits, temperature)
    return log_probs(logits[:, :vocabulary], temperature)


def _check_rows(
    student_hidden: Tensor, teacher_hidden: Tensor | None, per_token: tuple[Tensor, ...], weights: Tensor | None
) -> None:
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
    if weights is not None:
        if weights.shape != student_hidden.shape[:1]:
            raise ValueError(f"{len(student_hidden)} student states, but weights {list(weights.shape)}: give [N]")
        check_device(student_hidden, "student_hidden", weights, "weights")
    for values in per_token:
        if len(values) != len(student_hidden):
            raise ValueError(f"{len(student_hidden)} student states but {len(values)} rows of recorded values")
        check_device(student_hidden, "student_hidden", values, "recorded values")
