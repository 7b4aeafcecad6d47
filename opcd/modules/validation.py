"""The checks of a run before a model is loaded: the same in `fit`, `record`, `sweep` and `doctor --plan`.

`validate` calls the checks of the components (`Teacher.check`, `Rollout.check`, `Engine.check`); the others are here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from opcd.data import ContextQueryDataModule, TeacherModels
from opcd.data.example import ANCHORS
from opcd.data.readers import STAGES
from opcd.losses import Loss
from opcd.models import base_of, context_window, own_quantization, resolve
from opcd.modules.distributed.fsdp_strategy import (
    SHARDED,
    SHARDED_NAMES,
    FSDP2Strategy,
    check_configured,
    check_strategy,
)
from opcd.modules.lm.adapters import second_adapter
from opcd.modules.lm.cartridge import Cartridge, context_start
from opcd.modules.rollouts.base import Rollout
from opcd.modules.teachers.base import Reader, Teacher
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

if TYPE_CHECKING:
    from opcd.modules.distiller import Distiller


@dataclass
class Run:
    """What is known of a run before a model is loaded.

    Attributes:
        distiller: with its teacher, rollout and loss.
        data: its data module, set up for the stage; None if there is none of this class.
        stage: fit, validate, test or predict.
        ranks: number of processes that train together.
        sharded: whether the student is sharded across them.
        precision: the trainer's.
        strategy: the trainer's; None if there is no trainer.
        connect: whether to contact servers and engines.
    """

    distiller: Distiller
    data: ContextQueryDataModule | None = None
    stage: str = "fit"
    ranks: int = 1
    sharded: bool = False
    precision: str = "32-true"
    strategy: Strategy | None = None
    connect: bool = True

    @classmethod
    def of(cls, distiller: Distiller, trainer: Trainer, data: object, stage: str) -> Run:
        """The run of a trainer; the student is sharded in training only, because generation needs all weights."""
        strategy = trainer.strategy
        sharded = isinstance(strategy, FSDP2Strategy) and stage == "fit"
        rows = data if isinstance(data, ContextQueryDataModule) else None
        return cls(distiller, rows, stage, trainer.world_size, sharded, str(trainer.precision), strategy)

    @classmethod
    def configured(
        cls, distiller: Distiller, trainer: Any, data: ContextQueryDataModule | None, connect: bool = True
    ) -> Run:
        """The run of a trainer's config, which may be for another machine."""
        check_configured(trainer.strategy)
        name = str(getattr(trainer.strategy, "class_path", trainer.strategy)).rpartition(".")[2].lower()
        sharded, devices = name in SHARDED_NAMES, trainer.devices
        if not sharded and name not in ("auto", "singledevicestrategy") and not name.startswith("ddp"):
            raise UserError(f"trainer.strategy: {name} is not supported; use ddp, or {SHARDED}")
        if str(devices) in ("auto", "-1"):
            devices = max(1, torch.cuda.device_count()) if str(trainer.accelerator) in ("auto", "gpu", "cuda") else 1
        ranks = (len(devices) if isinstance(devices, list) else int(devices)) * int(trainer.num_nodes)
        return cls(distiller, data, "fit", ranks, sharded, str(trainer.precision), connect=connect)


def validate(run: Run) -> None:
    """Check a run.

    Raises:
        UserError: the run would fail or be wrong; the message names the problem, the config key and what to do.
    """
    distiller, predicts = run.distiller, run.stage == "predict"
    if run.precision.startswith("16"):
        raise UserError("trainer.precision: float16 needs loss scaling, which opcd lacks; use bf16-mixed or 32-true")
    if run.strategy is not None:
        check_strategy(run.strategy)
    if distiller.shrink_on_oom and run.ranks > 1:
        raise UserError("model.shrink_on_oom is for one rank, because it would block the others; remove it")
    _check_adapter(run)
    if run.sharded:
        _check_shards(run)
    if not predicts:  # `predict` has no teacher and no rollout
        check_loss(distiller.objective.loss, distiller.teacher)
        check_merged(distiller)
        for part in distiller.rollout.parts:
            part.check(run)
        for teacher in distiller.teacher.parts.values():
            teacher.check(run)
    if run.data is not None:
        check_data(run, run.data)


def check_positive(**values: float | None) -> None:
    """Raise a ValueError for settings that are not finite numbers greater than 0; None is allowed."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"model.{name} must be a finite number greater than 0, got {value}")


def check_scheduler(optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
    """Raise a ValueError for a scheduler that needs a metric, or that has wrong arguments."""
    if lr_scheduler is None:
        return
    stepped = optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
    try:
        made = lr_scheduler(stepped)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model.lr_scheduler: {error}") from error
    if isinstance(made, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ValueError(
            f"model.lr_scheduler: {type(made).__name__} waits for a metric, but the scheduler runs after every step; "
            "use one that counts steps, such as torch.optim.lr_scheduler.LinearLR, CosineAnnealingLR or OneCycleLR "
            "(warm-up, then cosine decay)"
        )


def check_weights(found: Mapping[str, Tensor], own: Mapping[str, Tensor], path: str) -> None:
    """Raise a UserError if the weights of a checkpoint are not the student's."""
    missing, unknown = [name for name in own if name not in found], [name for name in found if name not in own]
    other = [name for name in own if name in found and found[name].shape != own[name].shape]
    shapes = [f"{name} is {list(found[name].shape)} and not {list(own[name].shape)}" for name in other]
    for problem, names in (("does not have", missing), ("has also", unknown), ("has another shape of", shapes)):
        if names:
            raise UserError(
                f"{path} is of another student than model.student (with model.adapter): of its weights it {problem} "
                f"{names[0]}" + f" and {len(names) - 1} more" * (len(names) > 1)
            )


def check_loss(loss: Loss, teacher: Teacher) -> None:
    """Raise a UserError for a loss that needs more of the teacher than it provides."""
    losses = {"topk": "TopK with support: teacher", "token": "SampledReverseKL"}
    for part in teacher.parts.values():
        if "distribution" not in part.provides and loss.needs not in part.provides:
            raise UserError(
                f"model.loss: {type(part).__name__} gives log-probabilities of a few tokens a position, but {loss!r} "
                f"needs the whole distribution; use {' or '.join(losses[known] for known in part.provides)}"
            )


def check_merged(distiller: Distiller) -> None:
    """Raise a UserError for merged end tokens with a teacher that does not give the probability of each."""
    for part in distiller.teacher.parts.values():
        if distiller.merge_end_tokens and "distribution" not in part.provides:
            raise UserError(
                f"model.merge_end_tokens: {type(part).__name__} gives log-probabilities of a few tokens a position, "
                "and an end token may not be among them; remove it, or use a teacher that is a model in this process"
            )


def check_on_policy(loss: Loss, rollout: Rollout, temperature: float) -> None:
    """Raise a ValueError for a loss of sampled tokens whose tokens are not drawn from the student's distribution."""
    if not loss.on_policy:
        return
    name = type(loss).__name__
    if getattr(loss, "importance_clip", None) is not None:
        raise ValueError(
            "model.loss: importance_clip has no effect on a Distiller's loss, because the rollout gives the weights; "
            "remove it (VLLMRollout has importance_clip)"
        )
    for part in rollout.parts:
        if part.writer != "student":
            raise ValueError(
                f"model.loss: {name} needs tokens that the student has sampled, but {type(part).__name__} takes "
                "others; use StudentRollout or VLLMRollout, or ReverseKL, which uses the whole distribution"
            )
        sampling = part.sampling
        if sampling is None or sampling.temperature != temperature or sampling.is_cut:
            raise ValueError(
                f"model.loss: {name} needs tokens drawn from the distribution that it compares: set model.rollout's "
                f"sampling.temperature to model.temperature ({temperature}), and no top_p, top_k or options"
            )
        if part.stale and rollout.importance_clip is None:
            raise ValueError(f"model.loss: {name} with stale rollouts needs VLLMRollout's importance_clip; set it")


def check_data(run: Run, data: ContextQueryDataModule) -> None:
    """Raise a UserError for data that the run cannot use.

    Prompts without room for a response in a model's window, names of other teachers, a batch that ranks cannot divide.
    """
    distiller, predicts = run.distiller, run.stage == "predict"
    if run.stage == "fit":
        data.rows_on_each(run.ranks)
    anchored = run.stage == "fit" and data.anchors is not None
    if anchored:
        _check_anchors(distiller)
    if not predicts:
        _check_names(data, distiller.teacher)
    student = distiller.student_config
    window, adapter = context_window(student, "model.student"), distiller.adapter
    taken = adapter.num_virtual_tokens if isinstance(adapter, Cartridge) else 0
    base = Reader("model.student.name", student.name, window)
    own = Reader("model.student.name", student.name, window and window - taken)
    parts = distiller.teacher.parts
    readers = (
        {None: own} if predicts else {name: part.reader or base for name, part in parts.items() if name != ANCHORS}
    )
    engines = [] if predicts else [engine for part in distiller.rollout.parts for engine in part.engines]
    splits = [split for split in STAGES[run.stage] if data.sources[split]]
    for split in [*splits, *([ANCHORS] if anchored else [])]:
        sampled = distiller.eval_sampling.max_new_tokens
        new = sampled if predicts else distiller.rollout.max_response_tokens(data, split)
        asked = [own, *(Reader("model.rollout", type(engine).__name__, engine.window) for engine in engines)]
        for reader in asked:
            _check_window(reader, split, data.longest_student_prompt(split), new)
        for name, reader in readers.items():
            _check_window(reader, split, data.longest_teacher_prompt(split, name), new)


def _check_window(reader: Reader, split: str, prompt: int, new: int) -> None:
    if reader.window is not None and prompt + new > reader.window:
        raise UserError(
            f"{reader.key}: {reader.name} takes {reader.window} tokens, but the longest prompt of data.{split} has "
            f"{prompt} and up to {new} are added; shorten the context (data.max_context_tokens, data.overlong_context)"
        )


def _check_names(data: ContextQueryDataModule, teacher: Teacher) -> None:
    """Compare the teachers of the data module with those of the model; the command line links the two."""
    known = data.teacher.models if isinstance(data.teacher, TeacherModels) else {None: data.teacher}
    if known.keys() != teacher.parts.keys() - {ANCHORS}:
        raise UserError(
            "data.teacher: the data module knows of other teachers than model.teacher has; give it "
            "ContextQueryDataModule(teacher=TEACHER.models) of RoutedTeachers, or of a single teacher its ModelConfig"
        )


def _check_adapter(run: Run) -> None:
    """Check the student's adapter: present if needed, not over another adapter, with its library."""
    student, adapter = run.distiller.student_config, run.distiller.adapter
    if adapter is not None:
        require("adapters", "peft", "model.adapter")
        name = resolve(student)
        if base_of(name) != name:
            raise UserError(second_adapter("model.adapter", student.name))
        if isinstance(adapter, Cartridge):
            _check_cartridge(run)
    elif student.quantization != "none":
        raise UserError("model.student.quantization: quantized weights cannot be trained; set model.adapter as well")
    elif run.stage == "fit" and (method := own_quantization(student)) is not None:
        raise UserError(
            f"model.student.name: the weights of {student.name} are quantized ({method}), and quantized weights cannot "
            "be trained; set model.adapter as well"
        )


def _check_anchors(distiller: Distiller) -> None:
    """Check that rows without a context can be written, and scored by the student's start."""
    if distiller.rollout.multi_turn:
        name = type(distiller.rollout).__name__
        raise UserError(f"data.anchors: {name} plays games, and an anchor is a question; remove it")
    for part in distiller.teacher.parts.values():
        if part.shard:
            raise UserError(
                f"{part.key}.init_args.shard: with data.anchors, a rank whose rows are anchors would block the others; "
                "remove one of the two"
            )


def _check_cartridge(run: Run) -> None:
    """Check the options that a Cartridge does not support."""
    distiller = run.distiller
    if distiller.gradient_checkpointing:
        raise UserError(
            "model.gradient_checkpointing: a layer that is computed again does not see the keys and values of a "
            "Cartridge; remove it, and lower model.micro_batch_tokens instead"
        )
    if distiller.student_config.attention not in ("sdpa", "eager"):
        raise UserError(
            f"model.student.attention: {distiller.student_config.attention} is not tested with a Cartridge; use sdpa "
            "or eager"
        )
    if run.data is not None and run.stage == "fit" and isinstance(distiller.adapter, Cartridge):
        context_start(run.data, distiller.adapter)


def _check_shards(run: Run) -> None:
    """Check the options that a sharded student does not support."""
    distiller = run.distiller
    optimizer = type(distiller.optimizer([torch.nn.Parameter(torch.zeros(1, 1))]))
    if optimizer.__module__.startswith("bitsandbytes"):
        raise UserError(
            f"model.optimizer: {optimizer.__name__} of bitsandbytes takes no sharded weights; use torch.optim.AdamW, "
            "whose moments are sharded, or ddp"
        )
    if distiller.adapter is not None:
        raise UserError(
            f"trainer.strategy: {SHARDED} is for a student whose own weights are trained: an adapter's gradients and "
            "moments are small, and every rank needs the full base to generate; use ddp with model.adapter"
        )
    if distiller.shrink_on_oom:
        raise UserError(f"model.shrink_on_oom does not work under {SHARDED}; remove it")
