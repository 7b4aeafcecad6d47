"""A divergence from the student's hidden states and head, and from the teacher's or from a record of the teacher."""

from functools import partial

from torch import Tensor

from opcd.losses.chunking import LogProbsFunction, chunked
from opcd.losses.divergences import Divergence
from opcd.losses.head import Head, Projection
from opcd.losses.recorded import RecordedTokens, RecordedTopK
from opcd.losses.sampled import SampledReverseKL
from opcd.losses.topk import TopK


def chunked_divergence(
    divergence: Divergence | SampledReverseKL,
    student_hidden: Tensor,
    student_head: Head | Projection,
    teacher: Tensor | RecordedTopK | RecordedTokens,
    teacher_head: Head | Projection | None = None,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    memory_bytes: int | None = None,
) -> Tensor:
    """D(p_S, p_T) of every token, [N, H_s] and the teacher's side -> [N] in nats, no [N, V] ever stored.

    With the teacher's hidden states [N, H_t] and head, the result is ``divergence(student_head(student_hidden),
    teacher_head(teacher), temperature=temperature)``, computed in chunks. A teacher that is not loaded is given by a
    record: ``RecordedTopK`` (the k likeliest tokens) for a ``TopK`` with the teacher's support, ``RecordedTokens`` (the
    sampled tokens) for ``SampledReverseKL``. ``chunked`` describes the gradients, vocabularies of two sizes,
    ``weights``, ``memory_bytes`` and more errors.

    Raises:
        ValueError: the divergence cannot be computed from this teacher; the message says which can.
    """
    if isinstance(teacher, Tensor):
        if not isinstance(divergence, Divergence):
            raise ValueError(
                "SampledReverseKL looks at the sampled tokens only: give the teacher as RecordedTokens(tokens, "
                "log_probs); with the teacher's hidden states and head, ReverseKL has the same expected gradient and "
                "no variance"
            )
        if teacher_head is None:
            raise ValueError("the teacher's hidden states need its head: give teacher_head, as for the student")
        run = partial(chunked, lambda *both: (divergence.from_log_probs(*both),), student_hidden, student_head)
        run = partial(run, teacher, teacher_head)
    else:
        function = _of_record(divergence, teacher, teacher_head, temperature)
        run = partial(chunked, function, student_hidden, student_head, per_token=teacher.rows)
    return run(weights=weights, temperature=temperature, memory_bytes=memory_bytes)[0]


def _of_record(
    loss: Divergence | SampledReverseKL,
    record: RecordedTopK | RecordedTokens,
    teacher_head: object,
    temperature: float,
) -> LogProbsFunction:
    """A function of the student's log-probabilities [n, V] and a record's rows, for `chunked`."""
    if teacher_head is not None or temperature != 1.0:
        raise ValueError(
            f"teacher_head and a temperature other than 1 ({temperature:g} was given) have no effect on recorded "
            "log-probabilities; record them at the temperature that you want, and leave both out"
        )
    if isinstance(record, RecordedTopK) and isinstance(loss, TopK):
        loss.check_record(record.tokens.shape[-1])
        return lambda student, tokens, teacher: (loss.values_of_record(student, tokens, teacher)["divergence"],)
    if isinstance(record, RecordedTokens) and isinstance(loss, SampledReverseKL):
        return lambda student, tokens, *others: (loss(student.gather(-1, tokens[:, None])[:, 0], *others),)
    raise ValueError(
        f"{loss!r} cannot be computed from {type(record).__name__}: RecordedTopK gives the teacher's k likeliest "
        "tokens, for TopK(..., support='teacher'); RecordedTokens gives the sampled tokens, for SampledReverseKL(); "
        "all others need the teacher's hidden states and head"
    )
