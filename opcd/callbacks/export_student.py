"""Export of the trained student as a Hugging Face folder that plain `transformers` loads."""

import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.callbacks.log_folder import run_folder, still_there
from opcd.callbacks.recovery_and_drift import RecoveryAndDrift
from opcd.data import ContextQueryDataModule
from opcd.export.merge import write_merged
from opcd.models import architecture
from opcd.models.model_card import Facts, model_card
from opcd.modules import Cartridge, Distiller, Student, Teacher
from opcd.modules.lm.adapters import NOT_MERGED
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import require_own, whole_folder
from opcd.runtime.system_info import command_line


class ExportStudent(Callback):
    """Writes `student/` in the run's folder when training ends: safetensors, tokenizer, chat template, model card.

    Args:
        dtype: type of the exported weights; `auto`: that of the model that the student was made from.
        merge: merge the adapter into the exported model, and compare the result with the student. If they differ, the
            adapter is exported instead and the run ends with an error. false: export the adapter, for peft.
        every_n_steps: also write `student-step=N/` every n optimizer steps; null: at the end only.
    """

    def __init__(
        self,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        merge: bool = False,
        every_n_steps: int | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"ExportStudent needs every_n_steps >= 1 or null, got {every_n_steps}")
        self.dtype, self.merge, self.every_n_steps = dtype, merge, every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the options and the folder to write."""
        self._folder = run_folder(trainer)
        assert isinstance(pl_module, Distiller)
        if self.merge and pl_module.adapter is None:
            raise UserError("ExportStudent.merge: there is no model.adapter to merge; remove it")
        if self.merge and isinstance(pl_module.adapter, Cartridge):
            raise UserError(f"ExportStudent.merge: {NOT_MERGED}")
        if stage == "fit" and trainer.is_global_zero:
            require_own(self._folder / "student", "ExportStudent")
        if self.dtype != "auto" and pl_module.adapter is not None and not self.merge:
            raise UserError("ExportStudent.dtype has no effect on an adapter; remove it, or set merge")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write the folder of this step every n steps."""
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if due and (why := self._write(trainer, pl_module, f"student-step={trainer.global_step}")):
            rank_zero_warn(why)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the trained student, also in a resumed run that had no step left."""
        if why := self._write(trainer, pl_module, "student"):
            raise UserError(why)

    def _write(self, trainer: Trainer, pl_module: LightningModule, name: str) -> str | None:
        """Write the folder from rank 0; the other ranks wait. Returns the problem with `merge`, on rank 0."""
        assert isinstance(pl_module, Distiller)
        student, why = pl_module.student, None
        dtype = own_dtype(pl_module) if self.dtype == "auto" else getattr(torch, self.dtype)
        if student.is_sharded:  # every rank takes part in gathering a copy for rank 0
            device = torch.device("cpu" if trainer.is_global_zero else "meta")
            student = student.plain(dtype or student.model.dtype, device)
        if trainer.is_global_zero:
            still_there(self._folder)
            target = self._folder / name
            with whole_folder(target, "ExportStudent") as scratch:
                why = self._write_weights(pl_module, student, dtype, scratch)
                adapter = pl_module.adapter is not None and (not self.merge or why is not None)
                write_card(scratch, facts_of(trainer, pl_module), adapter)
            rank_zero_info(f"student written to {target}")
            why = why and f"ExportStudent.merge: {why}; {target} holds the adapter instead, which peft and opcd read"
        trainer.strategy.barrier()  # when one rank ends early, its launcher may end the others
        return why

    def _write_weights(
        self, distiller: Distiller, student: Student, dtype: torch.dtype | None, folder: Path
    ) -> str | None:
        """Write weights and tokenizer, or the adapter if merging fails. Returns the problem with merging."""
        if not self.merge:
            student.save(folder, dtype)
            return None
        try:
            write_merged(student, folder, dtype or student.model.dtype, distiller.student_config)
        except UserError as error:
            shutil.rmtree(folder, ignore_errors=True)
            student.save(folder)
            return str(error)
        return None


def own_dtype(distiller: Distiller) -> torch.dtype | None:
    """The type of the model that the student was made from; None: not known."""
    dtype = architecture(distiller.student_config).dtype
    return dtype if isinstance(dtype, torch.dtype) else None


def write_card(folder: Path, facts: Facts, adapter: bool) -> None:
    """Write the facts and the model card beside a student's weights."""
    facts.write(folder)
    (folder / "README.md").write_text(model_card(facts, adapter, command_line()), encoding="utf-8")


def facts_of(trainer: Trainer, distiller: Distiller) -> Facts:
    """The facts of the model card: the student's training so far, and its origin."""
    datamodule = getattr(trainer, "datamodule", None)
    data = datamodule if isinstance(datamodule, ContextQueryDataModule) else None
    base, measured = distiller.student_config.name, RecoveryAndDrift.last(trainer)
    is_current = measured is not None and measured.step == trainer.global_step
    of_now = measured.in_words() if measured is not None and is_current else {}
    return Facts(
        base=base,
        teacher={
            f"{name}: {type(part).__name__}" if name else type(part).__name__: _teacher_model(part, base)
            for name, part in distiller.teacher.parts.items()
        },
        context=data.context if data and isinstance(data.context, str) else None,
        context_sha256=data.context_hash if data else None,
        data=str(data.sources["train"]) if data else None,
        loss=str(distiller.objective.loss),
        temperature=distiller.objective.temperature,
        reduction=distiller.reduction,
        rollout=type(distiller.rollout).__name__,
        steps=trainer.global_step,
        recovery=of_now.get("recovery"),
        drift=of_now.get("drift"),
        batch_size=data.batch_size if data else None,
        precision=str(trainer.precision),
        **_optimizer(trainer),
        former_contexts=Facts.contexts_in(Path(base).expanduser()),
    )


def _optimizer(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's name, its initial learning rate, and the scheduler's name."""
    if not trainer.optimizers:
        return {}
    group = trainer.optimizers[0].param_groups[0]
    schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
    return {
        "optimizer": type(trainer.optimizers[0]).__name__,
        "learning_rate": float(group.get("initial_lr", group["lr"])),
        "lr_scheduler": schedulers[0] if schedulers else None,
    }


def _teacher_model(teacher: Teacher, base: str) -> str | None:
    """The name of the teacher's model, or None if it is a version of the student."""
    if teacher.reader is not None:
        return teacher.reader.name
    return base if teacher.frozen and teacher.stands_alone else None
