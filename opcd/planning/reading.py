"""A parsed config of `opcd fit` as a `Setting`."""

from collections.abc import Iterator
from typing import Any

import torch

from opcd.callbacks import AnswerSamples
from opcd.errors import UserError
from opcd.memory import GLIBC
from opcd.models import ModelConfig
from opcd.modules import (
    BaseTeacher,
    Distiller,
    FrozenTeacher,
    MixedRollout,
    MovingAverageTeacher,
    RecordedRollout,
    RecordedTeacher,
    Rollout,
    SelfTeacher,
    StudentRollout,
    TeacherRollout,
)
from opcd.modules.checks import check_adapter, check_recorded
from opcd.planning.lengths import Lengths
from opcd.planning.setting import Setting, adapter_weights
from opcd.planning.shapes import Weights, shape_of

SHORT = {"32": "32-true", "64": "64-true", "bf16": "bf16-mixed", "None": "32-true"}
"""Lightning's other names."""
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "bf16-mixed": (torch.bfloat16, None),
    "32-true": (None, None),
    "bf16-true": (None, torch.bfloat16),
    "64-true": (None, torch.float64),
}
"""Autocast's type, and that which all weights of the student get."""
SIDE = 1024
"""Rows and columns of the matrix that an optimizer is tried on."""


def read_setting(trainer: Any, distiller: Distiller, batch: int, lengths: Lengths, process: int) -> Setting:
    """What the config says, on this machine or, with accelerator gpu, on one with GPUs.

    Args:
        trainer: the config's part, not instantiated: the devices may be elsewhere.
        distiller: instantiated, without weights.
        batch: rows of a step on one rank.
        lengths: of the data.
        process: bytes of a process before it loads a model.

    Raises:
        UserError: something that `opcd fit` refuses, or that is not known here.
    """
    check_adapter(distiller.student_config, distiller.adapter, distiller.teacher)
    check_recorded(distiller.teacher, distiller.rollout, distiller.objective.loss, distiller.objective.temperature)
    autocast, forced = _precision(trainer.precision)
    gpu = on_gpu(trainer)
    ranks, sharded = _ranks(trainer, gpu)
    scoring = getattr(distiller.teacher, "config", None) or distiller.student_config
    _check_attention(distiller.student_config, scoring)
    student = _student(distiller, forced)
    prefix = distiller.teacher.prefix
    return Setting(
        student,
        lora=distiller.adapter,
        batch=batch,
        query=lengths.query,
        context=lengths.context,
        contexts=lengths.contexts,
        response=lengths.response,
        answers=_sample_answers(trainer),
        answer=distiller.answer.max_new_tokens,
        micro_batch_tokens=distiller.micro_batch_tokens,
        several_turns=distiller.rollout.several_turns,
        checkpointing=distiller.gradient_checkpointing,
        shared_prefix=prefix.mode != "never",
        prefix_bytes=prefix.memory_mib * 2**20,
        masks=gpu and scoring.attention != "flex_attention",
        autocast=autocast,
        gpu=gpu,
        packs=not gpu and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        keeps_freed=not gpu and GLIBC,
        ranks=ranks,
        sharded=sharded,
        process=0 if gpu else process,
        **_teacher(distiller, student, gpu),
        **_rollout(distiller.rollout, recorded=isinstance(distiller.teacher, RecordedTeacher)),
        **_optimizer(distiller, torch.float32 if distiller.adapter else student.dtype),
    )


def on_gpu(trainer: Any) -> bool:
    """Whether the accelerator is a GPU; auto takes one where there is one. UserError for neither GPU nor CPU."""
    name = str(trainer.accelerator)
    if name not in ("auto", "cpu", "gpu", "cuda"):
        raise UserError(f"trainer.accelerator: there is no plan for {name}; use cpu or gpu")
    return name in ("gpu", "cuda") or (name == "auto" and torch.cuda.is_available())


def _check_attention(*models: ModelConfig) -> None:
    if any(model.attention == "eager" for model in models):
        raise UserError("attention: there is no plan for eager, which has a score for every pair of tokens; use sdpa")


def _precision(configured: Any) -> tuple[torch.dtype | None, torch.dtype | None]:
    name = SHORT.get(str(configured), str(configured))
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision: there is no plan for {name}; use one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def _ranks(trainer: Any, gpu: bool) -> tuple[int, bool]:
    """How many there are, and whether the student lies in parts."""
    devices = trainer.devices
    if str(devices) in ("auto", "-1"):
        number = max(1, torch.cuda.device_count()) if gpu else 1
    else:
        number = len(devices) if isinstance(devices, list) else int(devices)
    strategy = getattr(trainer.strategy, "class_path", trainer.strategy)
    name = str(strategy).rpartition(".")[2].lower()
    sharded = name in ("modelparallelstrategy", "fullyshard")
    if not sharded and name not in ("auto", "singledevicestrategy") and not name.startswith("ddp"):
        raise UserError(f"trainer.strategy: there is no plan for {name}; use ddp, or ModelParallelStrategy (FSDP2)")
    return number * int(trainer.num_nodes), sharded


def _sample_answers(trainer: Any) -> int:
    """Rows of the callback that every training has, or of the config's own."""
    for callback in trainer.callbacks or []:
        if str(getattr(callback, "class_path", "")).endswith(f".{AnswerSamples.__name__}"):
            return int(callback.init_args.queries)
    return AnswerSamples().queries


def _student(distiller: Distiller, forced: torch.dtype | None) -> Weights:
    config = distiller.student_config
    own = _dtype(config, torch.bfloat16 if distiller.adapter else torch.float32)
    return Weights(shape_of(config, "model.student"), forced or own, config.quantization)


def _dtype(config: ModelConfig, auto: torch.dtype) -> torch.dtype:
    return auto if config.dtype == "auto" else getattr(torch, config.dtype)


def _teacher(distiller: Distiller, student: Weights, gpu: bool) -> dict[str, Any]:
    """The model that scores, what it takes beside the student, and whether its pages leave."""
    teacher, lora = distiller.teacher, distiller.adapter
    if isinstance(teacher, FrozenTeacher):
        config = teacher.config or distiller.student_config
        shape = shape_of(config, "model.teacher.init_args.model") if teacher.config else student.shape
        model = Weights(shape, _dtype(config, torch.bfloat16), config.quantization)
        mapped = not gpu and model.quantization == "none" and model.dtype == shape.dtype
        return {"scorer": model, "teacher_bytes": model.bytes, "teacher_leaves": mapped}
    if isinstance(teacher, MovingAverageTeacher) and lora is not None:
        return {"scorer": student, "teacher_bytes": 4 * adapter_weights(student.shape, lora)}
    if isinstance(teacher, MovingAverageTeacher):
        average = Weights(student.shape, torch.float32)
        return {"scorer": average, "teacher_bytes": average.bytes}
    if isinstance(teacher, BaseTeacher | SelfTeacher | RecordedTeacher):
        return {"scorer": None if isinstance(teacher, RecordedTeacher) else student}
    raise UserError(f"model.teacher: there is no plan for {type(teacher).__name__}: what it takes is not known")


def _rollout(rollout: Rollout, recorded: bool) -> dict[str, Any]:
    """Who writes, and in which type a student does; a recorded teacher has written."""
    kinds = {StudentRollout: "student", TeacherRollout: "" if recorded else "teacher", RecordedRollout: ""}
    parts = list(_single(rollout))
    for part in parts:
        if type(part) not in kinds:
            raise UserError(f"model.rollout: there is no plan for {type(part).__name__}: what it takes is not known")
    writers = tuple(sorted({kinds[type(part)] for part in parts} - {""}))
    dtypes = [part.dtype for part in parts if isinstance(part, StudentRollout)]
    return {"writers": writers} | ({"rollout_dtype": dtypes[0]} if dtypes else {})


def _single(rollout: Rollout) -> Iterator[Rollout]:
    """The rollouts within a mixed one, and the one that makes the moves of a game."""
    inner = getattr(rollout, "rollout", None)
    within = rollout.rollouts if isinstance(rollout, MixedRollout) else [inner] if isinstance(inner, Rollout) else []
    for part in within:
        yield from _single(part)
    if not within:
        yield rollout


def _optimizer(distiller: Distiller, dtype: torch.dtype) -> dict[str, Any]:
    """What a step of the optimizer keeps of each number of a matrix, tried on one; and whether it is fused."""
    matrix = torch.nn.Parameter(torch.ones(SIDE, SIDE, dtype=dtype))
    matrix.grad = torch.ones_like(matrix)
    try:
        optimizer = distiller.optimizer([matrix])
        optimizer.step()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"model.optimizer: its step fails on a matrix: {error}") from error
    kept = sum(value.nbytes for value in optimizer.state[matrix].values() if isinstance(value, torch.Tensor))
    return {"state_bytes": kept / matrix.numel(), "fused": bool(optimizer.defaults.get("fused"))}
