"""What lives in which phase of a step, and how large it is: the formula of docs/memory.md."""

from collections.abc import Iterator
from dataclasses import dataclass

from opcd.accel.cpu.heap import KEPT
from opcd.planning import sizes
from opcd.planning.setting import Setting
from opcd.planning.sizes import PHASES

STEP = PHASES[1:]

RUN, ADAPTED = 64 * 2**20, 48 * 2**20
"""What a run adds to its process beside what is counted, and what peft and its modules add (docs/memory.md)."""

HOLES, HOLES_ADAPTED = 0.3, 0.5
"""What glibc's heap holds free between its blocks, of what comes and goes in it; an adapter casts the input of each of
its layers anew, and leaves more (docs/memory.md)."""

FREE = "free in the heap"


@dataclass(frozen=True)
class Part:
    """One kind of memory."""

    name: str
    phases: dict[str, int]
    """Bytes in each phase that it lives in."""
    stays: bool = False
    """Whether it is there from step to step; else the heap has its memory for others in between."""


def parts(setting: Setting) -> list[Part]:
    """All that takes memory on one rank, without what takes none."""
    found = [*_staying(setting), *_passing(setting)]
    found += _kept_free(setting, found)
    return [part for part in found if any(part.phases.values())]


def peak(found: list[Part]) -> tuple[str, int]:
    """The phase that takes most, and how many bytes that is; of several, the one that has least of it free."""
    sums = {phase: sum(part.phases.get(phase, 0) for part in found) for phase in PHASES}
    phase = max(PHASES, key=lambda phase: (sums[phase], -free(found, phase)))
    return phase, sums[phase]


def free(found: list[Part], phase: str) -> int:
    """Bytes that the heap keeps for later in a phase."""
    return sum(part.phases.get(phase, 0) for part in found if part.name == FREE)


def _staying(s: Setting) -> Iterator[Part]:
    if s.process:
        yield _always("process", s.process + RUN + (ADAPTED if s.lora else 0))
    yield _always("student's weights", s.student_bytes)
    yield Part("optimizer's states", dict.fromkeys(STEP, s.optimizer_bytes), stays=True)
    if s.ranks > 1 and not s.sharded:
        yield _always("DDP's buckets", s.gradient_bytes)
    yield Part("teacher's weights", sizes.teacher(s), stays=True)
    yield Part("contexts' keys and values", dict.fromkeys(STEP, sizes.kept_prefixes(s)), stays=True)


def _passing(s: Setting) -> Iterator[Part]:
    yield Part("gradients", sizes.gradients(s))
    yield Part("gathered weights", dict.fromkeys(("student", "backward"), sizes.gathered(s)))
    yield Part("casts of weights", dict.fromkeys(("student", "backward", "optimizer"), sizes.casts(s)))
    yield Part("activations", sizes.activations(s))
    yield Part("one layer's pass", sizes.one_layer(s))
    yield Part("teacher's states", dict.fromkeys(("teacher", "student"), sizes.teacher_states(s)))
    yield Part("loss chunk", {"student": sizes.loss_chunk(s)})
    yield Part("copy that generates", sizes.generating_copy(s))
    yield Part("packed or cast weights", sizes.packed(s))
    yield Part("keys and values", sizes.keys_and_values(s))
    drawn = {"samples": s.answers * sizes.draw(s), "rollout": s.batch * sizes.draw(s) if s.writers else 0}
    yield Part("drawing a token", drawn)
    if s.gpu and not s.fused:
        yield Part("optimizer's scratch", {"optimizer": s.gradient_bytes})
    if s.unpacked and s.lora is None:  # an adapter's matrices are small
        yield Part("optimizer's scratch", {"optimizer": sizes.unpacked_states(s)})


def _always(name: str, size: int) -> Part:
    return Part(name, dict.fromkeys(PHASES, size), stays=True)


def _kept_free(s: Setting, found: list[Part]) -> list[Part]:
    """What glibc's heap holds free: holes, and what the largest phase has left, up to the limit of a whole run.

    With gradient checkpointing it is given back before the large phases, but for the holes of each.
    """
    if not s.keeps_freed:
        return []
    used = {phase: sum(p.phases.get(phase, 0) for p in found if not p.stays) for phase in PHASES}
    share = HOLES_ADAPTED if s.lora else HOLES
    most = round((1 + share) * max(used.values()))
    if s.checkpointing or most > KEPT:
        return [Part(FREE, {phase: round(share * size) for phase, size in used.items()})]
    # The sample answers come first: what the steps leave is not there yet.
    first = {"samples": round(share * used["samples"])}
    return [Part(FREE, first | {phase: most - used[phase] for phase in STEP})]
