"""The memory of each phase of a step, and ways to take less: the table of docs/memory.md."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch

from opcd.losses.chunking import GPU_LIVE, LIVE, rows_of
from opcd.planning.model_shapes import Model

PHASES = ("rollout", "teacher", "student", "backward", "optimizer")
"""The phases of a step. `student`: its forward pass and the loss."""
RUN, ADAPTED = 64 * 2**20, 48 * 2**20
"""Bytes of a process that are not counted otherwise, and more of them with peft (docs/memory.md)."""
HOLES, HOLES_ADAPTED = 0.3, 0.5
"""Share of temporary memory that glibc's heap holds free between its blocks. An adapter casts the input of each of its
layers again, and leaves more (docs/memory.md)."""
CPU_LIMIT = 2 * 2**30
"""On a CPU: most bytes that the heap keeps between steps, and of linear layers that are packed for oneDNN."""
MASK = 3
"""Bytes of a pair of tokens while the mask of packed rows is made: three comparisons (`modules/prefix/packing.py`)."""
UNPACKED = 20
"""Bytes of a number of the weight that bitsandbytes' 8-bit AdamW updates on a CPU (docs/log.md)."""
FREE = "free in the heap"
SMALLEST = 0.02
"""Least share of the peak that a change must save to be listed."""

Parts = dict[str, dict[str, int]]
"""Name of a part -> phase -> bytes."""


@dataclass(frozen=True)
class Setting:
    """The values that the memory of a run depends on. Rows and bytes are those of one rank."""

    student: Model
    scorer: Model | None  # the largest model of a teacher; None if none is in this process
    teacher_bytes: int = 0  # weights of teachers beside the student's
    writers: tuple[str, ...] = ("student",)  # the models that write responses in this process: student, teacher
    rollout_dtype: torch.dtype = torch.bfloat16  # type of the student's weights while it writes
    adapted: Callable[[], Model] | None = field(default=None, compare=False)  # the student with an adapter
    state_bytes: float = 8.0  # bytes of the optimizer's states for a trainable number
    fused: bool = True  # whether the optimizer's step needs no tensors beside its states
    batch: int = 8
    at_a_time: int | None = None  # most rows that are written side by side; None: all
    query: int = 64  # tokens of the longest prompt without the context
    context: int = 1024  # tokens that the longest context adds
    contexts: int = 1
    response: int = 128
    micro_batch_tokens: int = 4096
    multi_turn: bool = False  # whether an example makes several rows (games)
    checkpointing: bool = False
    prefix_bytes: int = 2048 * 2**20  # most bytes kept for contexts, one at least; 0: nothing is shared
    gpu: bool = False
    memory: int | None = None  # bytes of a GPU, a share of which is the loss's; None: this machine's, else 80 GiB
    heap: bool = False  # whether glibc keeps freed memory
    ranks: int = 1
    sharded: bool = False  # whether the student's weights, gradients and states are sharded over ranks (FSDP2)
    process: int = 0  # bytes of the process before a model is loaded; 0 on a GPU
    not_counted: tuple[str, ...] = ()  # a line for each component of unknown size

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch of the longest rows."""
        return min(self.batch, max(1, self.micro_batch_tokens // (self.query + self.response)))

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch of the longest rows."""
        return self.micro_rows * (self.query + self.response)


def parts(s: Setting) -> Parts:
    """All parts of the memory of one rank."""
    m, shares, full = s.student, s.ranks if s.sharded else 1, not s.student.adapter
    gradients, size = m.gradient_bytes // shares, m.dtype.itemsize
    staying = {
        "process": _in(s.process and s.process + RUN + ADAPTED * (not full)),
        "student's weights": _in(m.bytes // shares),
        "optimizer's states": _in(round((m.adapter or m.weights) * s.state_bytes) // shares),
        "DDP's buckets": _in(gradients if s.ranks > 1 and not s.sharded else 0),
        "teacher's weights": _in(s.teacher_bytes),
        "contexts' keys and values": _in(_prefixes(s)),
    }
    # The loss makes the head's gradient. The gradients of former micro-batches exist already.
    first = m.head * size * full + gradients * (s.multi_turn or s.micro_rows < s.batch)
    kept = round(s.tokens * m.kept_bytes)
    layer = (kept + m.linear * m.computing) // m.layers if s.checkpointing else 0
    kept = s.tokens * m.layers * m.hidden * size if s.checkpointing else kept
    gathered = (m.weights - m.linear) * size + 2 * m.linear // m.layers * m.computing
    unpacked = UNPACKED * m.head if s.state_bytes < 4 and not s.gpu and full else 0
    passing = {
        # The backward pass takes most at its beginning, with all activations, or at its end, with all gradients.
        "gradients": {"student": first, "backward": gradients, "optimizer": gradients},
        "activations": {"student": kept, "backward": max(0, kept + first - gradients)},
        "a layer computed again": {"backward": layer},
        "casts of weights": _in(0 if s.checkpointing or s.sharded else m.casts_bytes, *PHASES[2:]),
        "gathered weights": _in(gathered if s.sharded else 0, "student", "backward"),
        "loss chunk": {"student": _loss_chunk(s)},
        "copy that writes": {"rollout": _copy(s)},
        "keys and values": {"rollout": _written(s), "teacher": _attended(s)},
        "optimizer's scratch": {"optimizer": gradients if s.gpu and not s.fused else unpacked},
    }
    found = staying | passing | {FREE: _free(s, passing)}
    return {name: phases for name, phases in found.items() if any(phases.values())}


def peak(found: Parts) -> tuple[str, int]:
    """The phase with the largest sum, and the sum in bytes; among equals the phase with least free memory."""
    sums = {phase: sum(part.get(phase, 0) for part in found.values()) for phase in PHASES}
    phase = max(PHASES, key=lambda phase: (sums[phase], -found.get(FREE, {}).get(phase, 0)))
    return phase, sums[phase]


def ways(s: Setting) -> Iterator[tuple[str, Setting]]:
    """Yield config keys that save memory, each with the setting that it alone gives."""
    if not s.checkpointing:
        yield "model.gradient_checkpointing: true", replace(s, checkpointing=True)
    if s.adapted and not s.student.adapter and not s.sharded:
        yield "an adapter (configs/lora.yaml's model.adapter)", replace(s, student=s.adapted())
    if s.student.adapter and s.student.quantization == "none":
        yield "model.student.quantization: 4bit", replace(s, student=replace(s.student, quantization="4bit"))
    # The teacher loads a model of its own.
    if s.scorer and s.scorer != s.student and s.scorer.quantization == "none" and s.teacher_bytes == s.scorer.bytes:
        small = replace(s.scorer, quantization="4bit")
        yield "a 4-bit teacher (configs/teacher_4bit.yaml)", replace(s, scorer=small, teacher_bytes=small.bytes)
    if s.ranks > 1 and not s.sharded and not s.student.adapter:
        yield "trainer.strategy: fsdp2", replace(s, sharded=True)
    if s.state_bytes > 4 and not s.sharded:
        yield "model.optimizer: bitsandbytes.optim.AdamW8bit", replace(s, state_bytes=2.0, fused=True)
    if s.micro_rows > 1:
        half = s.tokens // s.micro_rows * (s.micro_rows // 2)
        yield f"model.micro_batch_tokens: {half}", replace(s, micro_batch_tokens=half)
    if s.batch > 1:
        yield f"data.batch_size: {s.batch // 2 * s.ranks}", replace(s, batch=s.batch // 2)


def until_it_fits(s: Setting, memory: int) -> list[tuple[str, int]]:
    """The changes that save most, one after another, with the peak after each, until the run fits.

    A number that is halved several times is listed once, with its last value.
    """
    taken: dict[str, tuple[str, int]] = {}
    while (now := peak(parts(s))[1]) > memory:
        tried = [(peak(parts(other))[1], name, other) for name, other in ways(s)]
        after, name, s = min(tried, key=lambda each: each[0], default=(now, "", s))
        if after > (1 - SMALLEST) * now:
            break
        taken.pop(name.split(":")[0], None)
        taken[name.split(":")[0]] = name, after
    return list(taken.values())


def _in(size: int, *phases: str) -> dict[str, int]:
    """The same bytes in each of the phases, by default in all."""
    return dict.fromkeys(phases or PHASES, size)


def _prefixes(s: Setting) -> int:
    """Bytes of the keys and values of the contexts that are kept; one at least."""
    one = s.context * s.scorer.token_bytes if s.scorer and s.prefix_bytes else 0
    return max(one, min(s.contexts * one, s.prefix_bytes))


def _copy(s: Setting) -> int:
    """Bytes of the student's weights in another type, or unsharded; else of a CPU's packed linear layers."""
    if "student" in s.writers and (s.sharded or s.student.dtype != s.rollout_dtype):
        return s.student.weights * s.rollout_dtype.itemsize
    writes = [s.student if name == "student" else s.scorer for name in s.writers]
    packed = [(m.head + m.linear * (m.quantization == "none")) * m.dtype.itemsize for m in writes if m and not s.gpu]
    return max((size for size in packed if size <= CPU_LIMIT), default=0)


def _written(s: Setting) -> int:
    """Bytes of the keys and values of rows that are written, at full length.

    A teacher's rows have the context: each for itself, unless it is one for all and the model reads it once for all.
    """
    row = s.query + s.response
    of_student = row * s.student.keys * 2 * s.rollout_dtype.itemsize if "student" in s.writers else 0
    of_teacher = 0
    if "teacher" in s.writers and s.scorer:
        once = s.contexts == 1 and s.prefix_bytes and not s.scorer.masks and not s.scorer.windows
        of_teacher = (row if once else s.context + row) * s.scorer.token_bytes
    return min(s.batch, s.at_a_time or s.batch) * max(of_student, of_teacher)


def rows_in_memory(s: Setting, memory: int) -> int:
    """Rows that a rollout writes side by side on a GPU of so many bytes, at least 1. Their cache grows by copying."""
    one = _written(replace(s, at_a_time=1))
    others = sum(part.get("rollout", 0) for part in parts(s).values()) - _written(s)
    return max(1, min(s.batch, (memory - others) // max(1, 2 * one)))


def _attended(s: Setting) -> int:
    """Bytes of the attention of packed rows to themselves and to a context, whose keys and values are kept already.

    A layer has the rows' own keys and values, and the results of both parts and of their merge. A model that needs a
    mask copies the context's keys and values and keeps those of all layers.
    """
    if not s.scorer or not s.prefix_bytes:
        return 0
    m = s.scorer
    if not m.masks:
        return s.tokens * (m.token_bytes // m.layers + 3 * m.hidden * m.computing)
    # The comparisons that make the mask; then its byte, and the numbers that torch makes of it. A second mask waits.
    pair = max(MASK, 1 + m.computing) + m.masks - 1
    return (s.context + s.tokens) * (m.token_bytes + s.tokens * pair)


def _loss_chunk(s: Setting) -> int:
    """Bytes of a chunk's log-probabilities and gradient; with short logits also the casts of a trainable head."""
    m, low, device = s.student, s.student.computing < 4, torch.device("cuda" if s.gpu else "cpu")
    rows = min(rows_of(device, m.vocabulary, memory=s.memory), s.micro_rows * s.response)
    casts = 2 * m.head * m.computing if low and m.dtype.itemsize == 4 and not m.adapter else 0
    number = 4 * GPU_LIVE if s.gpu else 4 * LIVE + (2 * m.computing if low else 0)
    return rows * m.vocabulary * number + casts


def _free(s: Setting, passing: Parts) -> dict[str, int]:
    """Bytes that glibc's heap holds free: holes, and the rest of the largest phase, up to the limit of a run.

    With gradient checkpointing the heap is trimmed before the large phases; only the holes of each stay.
    """
    used = {phase: sum(part.get(phase, 0) for part in passing.values()) for phase in PHASES}
    share = HOLES_ADAPTED if s.student.adapter else HOLES
    most = round((1 + share) * max(used.values()))
    if not s.heap:
        return {}
    if s.checkpointing or most > CPU_LIMIT:
        return {phase: round(share * size) for phase, size in used.items()}
    return {phase: most - size for phase, size in used.items()}
