"""Who learns, who scores and who writes in a run, as weights in memory."""

from typing import Any

import torch

from opcd.accel.cpu.heap import LARGE
from opcd.models import ModelConfig
from opcd.modules import (
    BaseTeacher,
    Distiller,
    FrozenTeacher,
    MovingAverageTeacher,
    RecordedRollout,
    RecordedTeacher,
    Rollout,
    SelfTeacher,
    ServedTeacher,
    StudentRollout,
    Teacher,
    TeacherRollout,
    VLLMRollout,
    VLLMServer,
)
from opcd.planning.model_shapes import Weights, shape_of
from opcd.planning.setting import adapter_weights
from opcd.runtime.errors import UserError


def student_of(distiller: Distiller, forced: torch.dtype | None, fast: torch.dtype) -> Weights:
    """The student, in `forced` where the trainer's precision gives all weights one type; frozen weights in `fast`."""
    config = distiller.student_config
    own = _dtype(config, fast if distiller.adapter else torch.float32)
    return Weights(shape_of(config, "model.student"), forced or own, config.quantization)


def _dtype(config: ModelConfig, auto: torch.dtype) -> torch.dtype:
    return auto if config.dtype == "auto" else getattr(torch, config.dtype)


def teacher_of(
    distiller: Distiller, student: Weights, fast: torch.dtype, gpu: bool, sharded: bool, ranks: int
) -> dict[str, Any]:
    """The model that scores (of several teachers the largest), what all take, and whether their pages leave."""
    each = [_one_teacher(part, distiller, student, fast, sharded, ranks) for part in distiller.teacher.parts.values()]
    models = [model for model, _, _ in each if model is not None]
    return {
        "scorer": max(models, key=lambda model: model.bytes, default=None),
        "teacher_bytes": sum(taken for _, taken, _ in each),
        "teacher_leaves": not gpu and all(leaves for _, _, leaves in each),
    }


def _one_teacher(
    teacher: Teacher, distiller: Distiller, student: Weights, fast: torch.dtype, sharded: bool, ranks: int
) -> tuple[Weights | None, int, bool]:
    """The model that scores, what it takes beside the student, and whether its pages leave when it has scored."""
    lora = distiller.adapter
    if isinstance(teacher, FrozenTeacher):
        config = teacher.config or distiller.student_config
        shape = shape_of(config, f"{teacher.key}.init_args.model") if teacher.config else student.shape
        model = Weights(shape, _dtype(config, fast), config.quantization)
        if teacher.shard:
            return model, _in_parts(model, ranks), False
        mapped = model.quantization == "none" and model.dtype == shape.dtype
        return model, model.bytes, mapped and (distiller.gradient_checkpointing or model.bytes >= LARGE)
    if isinstance(teacher, MovingAverageTeacher):
        average = student if lora is not None else Weights(student.shape, torch.float32)
        return average, 4 * adapter_weights(student.shape, lora) if lora is not None else average.bytes, False
    if isinstance(teacher, BaseTeacher | SelfTeacher):
        return student, student.bytes if sharded else 0, False  # whoever is asked has whole weights
    if isinstance(teacher, RecordedTeacher | ServedTeacher):
        return None, 0, False
    raise UserError(f"{teacher.key}: there is no plan for {type(teacher).__name__}: what it takes is not known")


def _in_parts(model: Weights, ranks: int) -> int:
    """Bytes of a model whose layers lie in parts on the ranks, while one of them is whole."""
    layers = model.shape.linear_weights * model.dtype.itemsize
    return model.bytes - layers + layers // ranks + layers // model.shape.layers


def writers_of(rollout: Rollout, recorded: bool, fast: torch.dtype) -> dict[str, Any]:
    """Who writes here, and in which type a student does; what is recorded, or a server's, is written elsewhere."""
    names, dtypes = set(), []
    for part in rollout.parts:
        if isinstance(part, StudentRollout):
            names.add("student")
            dtypes.append(part.dtype or fast)
        elif isinstance(part, TeacherRollout) and not recorded:
            names.add("teacher")
        elif not _elsewhere(part):
            raise UserError(f"model.rollout: there is no plan for {_name(part)}: what it takes is not known")
    return {"writers": tuple(sorted(names))} | ({"rollout_dtype": dtypes[0]} if dtypes else {})


def _elsewhere(part: Rollout) -> bool:
    served = isinstance(part, VLLMRollout) and isinstance(part.engine, VLLMServer)
    return served or isinstance(part, RecordedRollout | TeacherRollout)


def _name(part: Rollout) -> str:
    return type(part.engine if isinstance(part, VLLMRollout) else part).__name__
