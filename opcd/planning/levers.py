"""What would make a run smaller, tried on paper."""

from collections.abc import Iterator
from dataclasses import replace

from opcd.modules import Lora
from opcd.planning.model_shapes import Weights
from opcd.planning.parts import parts, peak
from opcd.planning.setting import UNPACKED, Setting

SMALLEST = 0.02
"""A lever that moves the peak by a smaller share is none."""


def ways(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """Config keys that take less memory, each alone, with the setting that it gives."""
    if not setting.checkpointing:
        yield "model.gradient_checkpointing: true", replace(setting, checkpointing=True)
    if setting.lora is None and not setting.sharded:
        frozen = replace(setting.student, dtype=setting.fast)
        small = replace(setting, student=frozen, scorer=_following(setting, frozen), lora=Lora())
        yield "an adapter (configs/lora.yaml's model.adapter)", small
    if setting.lora is not None and setting.student.quantization == "none":
        quantized = replace(setting.student, quantization="4bit")
        small = replace(setting, student=quantized, scorer=_following(setting, quantized))
        yield "model.student.quantization: 4bit", small
    if (frozen_teacher := _quantizable(setting)) is not None:
        teacher = replace(frozen_teacher, quantization="4bit")
        smaller = replace(setting, scorer=teacher, teacher_bytes=teacher.bytes, teacher_leaves=False)
        yield "a 4-bit teacher (configs/teacher_4bit.yaml)", smaller
    if setting.ranks > 1 and not setting.sharded and setting.lora is None:
        yield "trainer.strategy: ModelParallelStrategy (FSDP2)", replace(setting, sharded=True)
    if setting.state_bytes > 4:
        small = replace(setting, state_bytes=2.0, unpacked=0.0 if setting.gpu else UNPACKED)
        yield "model.optimizer: bitsandbytes.optim.AdamW8bit", small
    if setting.micro_rows > 1:
        half = setting.row * (setting.micro_rows // 2)
        yield f"model.micro_batch_tokens: {half}", replace(setting, micro_batch_tokens=half)
    if setting.batch > 1:
        yield f"data.batch_size: {setting.batch // 2}", replace(setting, batch=setting.batch // 2)


def largest(setting: Setting) -> tuple[str, int, Setting] | None:
    """The lever that leaves the smallest peak, with that peak; None where none counts."""
    now = peak(parts(setting))[1]
    tried = [(name, peak(parts(other))[1], other) for name, other in ways(setting)]
    return min((t for t in tried if t[1] < (1 - SMALLEST) * now), key=lambda t: t[1], default=None)


def until_it_fits(setting: Setting, memory: int) -> list[tuple[str, int]]:
    """The largest lever, then the largest that is left, ...: their names, and the peak after each.

    A number that is halved several times comes once, as it is in the end.
    """
    taken: list[tuple[str, int]] = []
    while peak(parts(setting))[1] > memory and (found := largest(setting)) is not None:
        name, now, setting = found
        if taken and taken[-1][0].split(":")[0] == name.split(":")[0]:
            taken.pop()
        taken.append((name, now))
    return taken


def _following(setting: Setting, student: Weights) -> Weights | None:
    """What scores when the student's weights are others."""
    return student if setting.scorer == setting.student else setting.scorer


def _quantizable(setting: Setting) -> Weights | None:
    """A frozen teacher in full numbers."""
    scorer = setting.scorer
    own = scorer is not None and setting.teacher_bytes == scorer.bytes and scorer.dtype == setting.fast
    return scorer if own and scorer is not None and scorer.quantization == "none" else None
