"""What a Distiller refuses before a model is loaded."""

import math
from collections.abc import Mapping

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from opcd.data import ContextQueryDataModule, TeacherModels
from opcd.data.readers import STAGES
from opcd.losses import Divergence, SampledReverseKL
from opcd.models import ModelConfig, base_of, context_window, load_tokenizer, own_quantization, resolve
from opcd.modules.distributed.fsdp_strategy import SHARDED
from opcd.modules.lm.adapters import Lora, second_adapter
from opcd.modules.lm.generation import Sampling
from opcd.modules.objective import Objective
from opcd.modules.rollouts.colocated_vllm import ColocatedVLLM
from opcd.modules.rollouts.engine import Engine
from opcd.modules.rollouts.plain_rollouts import Rollout, StudentRollout, TeacherRollout
from opcd.modules.rollouts.vllm_rollout import VLLMRollout
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.model_teachers import BaseTeacher
from opcd.modules.teachers.recorded_teacher import RecordedTeacher
from opcd.modules.teachers.served_teacher import ServedTeacher
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

Reader = tuple[str, str, int | None]
"""The config key of a model, its name, and its window where that is known."""


def check_positive(**values: float | None) -> None:
    """Refuse settings that are given and no finite number greater than 0 (``ValueError``)."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"model.{name} must be a finite number greater than 0, got {value}")


def check_scheduler(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Refuse a scheduler that waits for a metric, or whose arguments are wrong (``ValueError``)."""
    if lr_scheduler is None:
        return
    stepped = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    try:
        made = lr_scheduler(stepped)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.lr_scheduler: {error}") from error
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"model.lr_scheduler: {type(made).__name__} waits for a metric, and the rate is changed after every step "
            "here; take one that follows the steps, such as torch.optim.lr_scheduler.LinearLR, CosineAnnealingLR or "
            "OneCycleLR (warm-up, then a decay by cosine)"
        )


def check_weights(found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    """Refuse the weights of a checkpoint that are not the student's (UserError)."""
    missing, unknown = [name for name in own if name not in found], [name for name in found if name not in own]
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    shapes = [f"{name} is {list(found[name].shape)} and not {list(own[name].shape)}" for name in other]
    for problem, names in (("does not have", missing), ("has also", unknown), ("has another shape of", shapes)):
        if names:
            raise UserError(
                f"{path} is of another student than model.student (with model.adapter): of its weights it {problem} "
                f"{names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1)
            )


def check_data(
    data: ContextQueryDataModule,
    stage: str,
    rollout: Rollout,
    answer: Sampling,
    student: ModelConfig,
    teacher: Teacher,
) -> None:
    """Refuse prompts that leave no room for a response in a model's window, and names of other teachers (UserError)."""
    if stage != "predict":
        _check_names(data, teacher)
    own = ("model.student.name", student.name, context_window(student, "model.student"))
    readers = {None: own} if stage == "predict" else {name: _reader(part, own) for name, part in teacher.parts.items()}
    for split in (split for split in STAGES[stage] if data.sources[split]):
        new = answer.max_new_tokens if stage == "predict" else rollout.longest_response(data, split)
        _check_window(*own, split, data.longest_student_prompt(split), new)
        for engine in engines_of(rollout) if stage != "predict" else []:
            window = ("model.rollout", type(engine).__name__, engine.window)
            _check_window(*window, split, data.longest_student_prompt(split), new)
        for name, reader in readers.items():
            _check_window(*reader, split, data.longest_teacher_prompt(split, name), new)


def _reader(teacher: Teacher, own: Reader) -> Reader:
    """Who sees a teacher's prompts; one without a model of its own has the student's."""
    if isinstance(teacher, ServedTeacher):
        return f"{teacher.key}.init_args.name", teacher.name, teacher.window
    if teacher.config is None:
        return own
    key = f"{teacher.key}.init_args.model"
    return f"{key}.name", teacher.config.name, context_window(teacher.config, key)


def _check_names(data: ContextQueryDataModule, teacher: Teacher) -> None:
    """Refuse a data module that knows of other teachers than there are; the command line links the two."""
    known = data.teacher.models if isinstance(data.teacher, TeacherModels) else {None: data.teacher}
    if known.keys() != teacher.parts.keys():
        raise UserError(
            "data.teacher: the data module knows of other teachers than model.teacher has; give it "
            "ContextQueryDataModule(teacher=TEACHER.models) of RoutedTeachers, or of a single teacher its ModelConfig"
        )


def _check_window(key: str, name: str, window: int | None, split: str, prompt: int, new: int) -> None:
    if window is not None and prompt + new > window:
        raise UserError(
            f"{key}: {name} takes {window} tokens, but the longest prompt of data.{split} has {prompt} and "
            f"up to {new} are added; shorten the context (data.max_context_tokens, data.overlong_context)"
        )


def check_adapter(student: ModelConfig, adapter: Lora | None, teacher: Teacher, trains: bool = True) -> None:
    """Refuse what needs an adapter without one, and an adapter over another or without its library (UserError)."""
    if adapter is not None:
        require("adapters", "peft", "model.adapter")
        name = resolve(student)
        if base_of(name) != name:
            raise UserError(second_adapter("model.adapter", student.name))
    elif student.quantization != "none":
        raise UserError("model.student.quantization: quantized weights cannot be trained; set model.adapter as well")
    elif any(isinstance(part, BaseTeacher) for part in teacher.parts.values()):
        raise UserError("model.teacher: BaseTeacher is the student without its adapter; set model.adapter")
    elif trains and (method := own_quantization(student)) is not None:
        raise UserError(
            f"model.student.name: the weights of {student.name} are quantized ({method}), and quantized weights cannot "
            "be trained; set model.adapter as well"
        )


def check_shards(
    adapter: Lora | None, rollout: Rollout, halve_micro_batches: bool, optimizer: type[torch.optim.Optimizer]
) -> None:
    """Refuse what a sharded student cannot be trained with (UserError)."""
    if any(isinstance(engine, ColocatedVLLM) for engine in engines_of(rollout)):
        raise UserError(f"model.rollout: ColocatedVLLM takes no sharded weights ({SHARDED}); use VLLMServer, or ddp")
    if optimizer.__module__.startswith("bitsandbytes"):
        raise UserError(
            f"model.optimizer: {optimizer.__name__} of bitsandbytes takes no sharded weights; use torch.optim.AdamW, "
            "whose moments are sharded, or ddp"
        )
    if adapter is not None:
        raise UserError(
            f"trainer.strategy: {SHARDED} is for a student whose own weights are trained: an adapter's gradients and "
            "moments are small, and its base is needed whole on every rank that generates; use ddp with model.adapter"
        )
    if halve_micro_batches:
        raise UserError(f"model.halve_micro_batches does not work under {SHARDED}; remove it")


def check_teacher_parts(teacher: Teacher, rollout: Rollout, ranks: int) -> None:
    """Refuse what a teacher whose weights lie in parts cannot do (UserError)."""
    for part in (part for part in teacher.parts.values() if part.shard):
        key = f"{part.key}.init_args.shard"
        if ranks == 1:
            raise UserError(f"{key} has no effect on one rank; remove it, or set trainer.devices")
        if len(teacher.parts) > 1:
            raise UserError(f"{key}: a rank without rows of this teacher would keep the others waiting; remove it")
        if any(writer.teacher_writes for writer in rollout.parts):
            raise UserError(f"{key}: a teacher in parts scores and does not write; use StudentRollout, or remove it")
        if part.config is not None and part.config.quantization != "none":
            raise UserError(f"{key}: quantized weights cannot lie in parts; remove it, or the quantization")
        if part.prefix.mode == "auto":
            raise UserError(
                f"{key}: model.shared_prefix: auto may fail on one rank alone, and the others would wait; set it to "
                "always (after a run on one rank that does not warn) or never"
            )


def check_recorded(teacher: Teacher, rollout: Rollout, loss: Divergence | SampledReverseKL, temperature: float) -> None:
    """Refuse a recorded teacher where it is asked for what it has not said (UserError)."""
    for recorded in (part for part in teacher.parts.values() if isinstance(part, RecordedTeacher)):
        if not isinstance(rollout, TeacherRollout):
            raise UserError(
                f"model.rollout: RecordedTeacher knows its own responses alone, and {type(rollout).__name__} takes "
                "others; use TeacherRollout"
            )
        recorded.check(loss, temperature, rollout.sampling)


def engines_of(rollout: Rollout) -> list[Engine]:
    """The engines that write for a rollout."""
    return [part.engine for part in rollout.parts if isinstance(part, VLLMRollout)]


def check_engine(rollout: Rollout, ranks: int) -> None:
    """Refuse an engine in this process where there are several (UserError)."""
    if ranks > 1 and any(isinstance(engine, ColocatedVLLM) for engine in engines_of(rollout)):
        raise UserError("model.rollout: ColocatedVLLM is for one process; use VLLMServer with several trainer.devices")


def check_served(teacher: Teacher, stage: str, rollout: Rollout, objective: Objective, student: ModelConfig) -> None:
    """Refuse a teacher behind a server that does not answer, or is asked for what it does not say (UserError)."""
    for served in (part for part in teacher.parts.values() if isinstance(part, ServedTeacher)):
        if any(part.teacher_writes for part in rollout.parts):
            raise UserError(
                "model.rollout: ServedTeacher scores responses and writes none; use StudentRollout, or "
                "RecordedRollout, which takes those of the data"
            )
        served.check(objective.loss, objective.temperature)
        if stage != "predict":
            served.connect(load_tokenizer(student, "model.student"))


def check_sampled(loss: SampledReverseKL, rollout: Rollout, temperature: float) -> None:
    """Refuse what would bias the sampled reverse KL: tokens that are no draws from the student's own distribution."""
    if not isinstance(rollout, StudentRollout | VLLMRollout):
        raise ValueError(
            f"model.loss: SampledReverseKL needs tokens that the student has sampled, and {type(rollout).__name__} "
            "takes others; use StudentRollout or VLLMRollout, or ReverseKL, which looks at the whole distribution"
        )
    sampling = rollout.sampling
    if sampling.temperature != temperature or sampling.top_p < 1 or sampling.top_k > 0 or sampling.options:
        raise ValueError(
            "model.loss: SampledReverseKL needs tokens drawn from the distribution that it compares: set "
            f"model.rollout's sampling.temperature to model.temperature ({temperature}, not {sampling.temperature}), "
            "and no top_p, top_k or options"
        )
    if loss.max_importance is not None:
        raise ValueError(
            "model.loss: max_importance has no effect here, the rollout gives the weights (VLLMRollout has "
            "max_importance); remove it"
        )
    if isinstance(rollout, VLLMRollout) and rollout.every_n_steps > 1 and rollout.max_importance is None:
        raise ValueError("model.loss: SampledReverseKL with stale rollouts needs VLLMRollout's max_importance; set it")
