"""How large the parts of a run are, in bytes on one rank."""

import torch

from opcd.accel.cpu.onednn_linear import FEWEST_STEPS, MOST_BYTES
from opcd.losses.chunking import LIVE, MEMORY_BYTES, MOST_ROWS
from opcd.planning.activations import alive_in_layer, kept_of_layer, kept_of_pass
from opcd.planning.model_shapes import Weights
from opcd.planning.setting import Setting

PHASES = ("samples", "rollout", "teacher", "student", "backward", "optimizer")
"""Sample answers before training; then the parts of a step. The student's has its pass and the loss."""

DRAWN = 18
"""Bytes of a token's probability while one is drawn: logits, their float32 copy, a softmax, a float64 sum."""

MASK = 3
"""Bytes of a pair of tokens while the mask of packed rows is made: three comparisons (`modules/packing.py`)."""


def teacher(s: Setting) -> dict[str, int]:
    """Weights; mapped ones leave when they have scored, and their head when the loss has read it."""
    if not s.teacher_leaves or s.scorer is None:
        return dict.fromkeys(PHASES, s.teacher_bytes)
    head = s.scorer.shape.head * s.scorer.dtype.itemsize
    writes = s.teacher_bytes if "teacher" in s.writers else 0
    return {"samples": s.teacher_bytes, "rollout": writes, "teacher": s.teacher_bytes, "student": head}


def kept_prefixes(s: Setting) -> int:
    """Keys and values of as many contexts as may be kept; one at least."""
    if s.scorer is None or not s.shared_prefix:
        return 0
    one = s.context * s.scorer.token(s.autocast)
    return max(one, min(s.contexts * one, s.prefix_bytes))


def gradients(s: Setting) -> dict[str, int]:
    """The loss makes the head's; all others come in the backward pass, while the activations go."""
    first = _head_gradient(s) + (s.gradient_bytes if s.several_passes else 0)
    backward = first if _begins_largest(s) else s.gradient_bytes
    return {"student": first, "backward": backward, "optimizer": s.gradient_bytes}


def _begins_largest(s: Setting) -> bool:
    """Whether the backward pass takes most when it begins: with all activations, and few gradients."""
    rest = 0 if s.several_passes else s.gradient_bytes - _head_gradient(s)
    return s.tokens * kept_of_pass(s) > rest


def _head_gradient(s: Setting) -> int:
    return s.student.shape.head * s.student.dtype.itemsize if s.lora is None else 0


def gathered(s: Setting) -> int:
    """Embedding and head from the student's call to the end of its backward pass, and two layers."""
    if not s.sharded:
        return 0
    shape = s.student.shape
    layers = 2 * shape.linear_weights // shape.layers * s.computing
    return (shape.weights - shape.linear_weights) * s.student.dtype.itemsize + layers


def casts(s: Setting) -> int:
    """Autocast's casts are kept for the backward pass; not with gradient checkpointing, nor of gathered weights."""
    if s.autocast is None or s.checkpointing or s.sharded:
        return 0
    cast = s.student.shape.linear_weights if s.student.dtype != s.autocast else 0
    return (cast + s.adapter_weights) * s.autocast.itemsize


def activations(s: Setting) -> dict[str, int]:
    """What a micro-batch keeps for its gradient."""
    kept = s.tokens * kept_of_pass(s)
    return {"student": kept, "backward": kept if _begins_largest(s) else 0}


def one_layer(s: Setting) -> dict[str, int]:
    """What comes and goes within a layer; in the backward pass of gradient checkpointing, all that it keeps."""
    found = {"samples": s.answers * s.query * alive_in_layer(s.student, s.computing)}
    backward = s.tokens * alive_in_layer(s.student, s.computing)
    if s.checkpointing:
        backward += s.tokens * kept_of_layer(s) + s.student.shape.linear_weights // s.student.shape.layers * s.computing
    found |= {"student": s.tokens * alive_in_layer(s.student, s.computing), "backward": backward}
    if s.scorer is not None:
        whole = s.context + s.row
        tokens = max(s.tokens, whole) if s.shared_prefix else max(1, s.micro_batch_tokens // whole) * whole
        found["teacher"] = tokens * alive_in_layer(s.scorer, s.scorer.computing(s.autocast))
    written = [_writer(s, name) for name in s.writers]
    prompts = [s.batch * s.query * alive_in_layer(model, model.computing(s.autocast)) for model in written]
    return found | {"rollout": max(prompts, default=0)}


def teacher_states(s: Setting) -> int:
    """Last hidden states of the responses of a micro-batch."""
    return s.micro_rows * s.response * s.scorer.shape.hidden * s.scorer.dtype.itemsize if s.scorer else 0


def loss_chunk(s: Setting) -> int:
    """The log-probabilities of a chunk and their gradient, beside its logits where those are shorter."""
    vocabulary, low = s.student.shape.vocabulary, s.computing < 4
    rows = max(1, min(MOST_ROWS, MEMORY_BYTES // (4 * LIVE * vocabulary), s.micro_rows * s.response))
    numbers = 4 * (LIVE if s.scorer else LIVE - 1) + (2 * s.computing if low else 0)
    casts = 2 * s.student.shape.head * s.computing if s.lora is None and low and s.student.dtype.itemsize == 4 else 0
    return rows * vocabulary * numbers + casts  # the head's cast, and its gradient from one chunk


def generating_copy(s: Setting) -> dict[str, int]:
    """A student's weights in the type that writes, or whole where it lies in parts."""
    whole = s.student.shape.weights * s.rollout_dtype.itemsize
    needed = "student" in s.writers and (s.sharded or s.student.dtype != s.rollout_dtype)
    return {"samples": whole if s.sharded and s.answers else 0, "rollout": whole if needed else 0}


def packed(s: Setting) -> dict[str, int]:
    """Copies of linear layers for the time of a generation; elsewhere autocast's casts, which are kept as long."""
    student = max((_packed_to_write(s, name) for name in s.writers), default=0)
    answers = _packed_bytes(s, s.student) if s.answer >= FEWEST_STEPS and s.answers else 0
    if not answers and s.answers and not s.sharded and s.computing < s.student.dtype.itemsize:
        answers = s.computing * (s.student.shape.linear_weights + s.student.shape.head)
    return {"samples": answers, "rollout": student if s.response >= FEWEST_STEPS else 0}


def _packed_to_write(s: Setting, name: str) -> int:
    """Of a copy that generates, the packed layers take its own memory; not the head's where that is the embedding."""
    size, shape = _packed_bytes(s, _writer(s, name)), s.student.shape
    if size and name == "student" and generating_copy(s)["rollout"]:
        return 2 * shape.head if shape.tied else 0
    return size


def _packed_bytes(s: Setting, model: Weights) -> int:
    number = model.computing(s.autocast)
    if not s.packs or number not in (torch.float32.itemsize, s.fast.itemsize):
        return 0
    size = number * (model.shape.head + (model.shape.linear_weights if model.quantization == "none" else 0))
    return size if size <= MOST_BYTES else 0


def keys_and_values(s: Setting) -> dict[str, int]:
    """Of rows that are written: all of their tokens; of packed rows that are scored: their own, and the context's once.

    Prompts with a context start from its keys and values, copied to each row.
    """
    found = {"samples": (s.answers * (s.context + s.query + s.answer) + s.context) * s.student.token(s.autocast)}
    if not s.answers:
        found["samples"] = 0
    rows = [
        s.batch * (s.row + (s.context if n == "teacher" else 0)) * _writer(s, n).token(s.autocast) for n in s.writers
    ]
    found["rollout"] = max(rows, default=0)
    if s.scorer is not None and s.shared_prefix:
        pairs = s.tokens * (s.context + s.tokens) if s.masks else 0
        # Comparisons while it is made; then a byte, of which torch makes numbers. One mask more waits meanwhile.
        mask = pairs * (max(MASK, 1 + s.scorer.computing(s.autocast)) + s.scorer.shape.masks - 1)
        found["teacher"] = (s.context + s.tokens) * s.scorer.token(s.autocast) + mask
    return found


def _writer(s: Setting, name: str) -> Weights:
    """The model that writes."""
    if name == "student":
        return Weights(s.student.shape, s.rollout_dtype, s.student.quantization)
    assert s.scorer is not None
    return s.scorer


def draw(s: Setting) -> int:
    """One token of one row."""
    return s.student.shape.vocabulary * DRAWN


def unpacked_states(s: Setting) -> int:
    """What an optimizer's step unpacks of the largest weight, the embedding."""
    return round(s.unpacked * s.student.shape.vocabulary * s.student.shape.hidden)
