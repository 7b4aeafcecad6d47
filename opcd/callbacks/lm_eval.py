"""Evaluation with lm-eval during training, without an effect on the training."""

from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from opcd.accel import accelerator
from opcd.accel.precision import warn_if_emulated
from opcd.callbacks.log_folder import run_folder, still_there
from opcd.data import ContextQueryDataModule, ExampleSource
from opcd.evaluation import Evaluation, Evaluator
from opcd.evaluation.result_files import write_rows
from opcd.games import GameSeeds
from opcd.modules import Distiller
from opcd.modules.lm.generation import computing_dtype
from opcd.modules.student import Student
from opcd.runtime.errors import UserError


class LMEval(Callback):
    """Evaluates the student every n steps and at the end of training.

    The metrics are logged as `eval/TASK/METRIC`, where a ModelCheckpoint can monitor them, with the bounds of the first
    metric's 95 % interval as `METRIC_low` and `METRIC_high`. Every answer is written to `eval/step=N-TASK.jsonl` in
    the run's folder. Training is bit for bit the same as without this callback.

    Do not report rows that chose a checkpoint: if `eval/...` is monitored, use validation rows in `evaluation.data`,
    and evaluate the chosen student's folder on the test rows with `opcd evaluate`.

    With several ranks, each answers its share of the questions.

    Args:
        evaluation: the tasks, and how the answers are drawn.
        every_n_steps: optimizer steps between two evaluations; null: at the end only.
        at_start: also evaluate before the first step.
        dtype: type of the weights that answer. `auto`: bfloat16 if the trainer computes in it (a copy of the master
            weights, as in the exported student), else the student's own type.
        name: the first part of the metrics' names, and the folder of the answers. Two of these callbacks need two
            names.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        every_n_steps: int | None = None,
        at_start: bool = False,
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        name: str = "eval",
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"LMEval needs every_n_steps >= 1 or null, got {every_n_steps}")
        if not name or "/" in name:
            raise ValueError(f"LMEval needs a name without a slash, got {name!r}")
        self.evaluation, self.every_n_steps, self.at_start = evaluation, every_n_steps, at_start
        self.dtype, self.name = dtype, name
        self._main: list[tuple[int, dict[str, float]]] = []

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint; several callbacks differ by their names."""
        return f"{type(self).__name__}({self.name})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read and check tasks and rows before a model is loaded."""
        if stage != "fit":
            return
        assert isinstance(pl_module, Distiller)
        self._folder = run_folder(trainer) / self.name
        prefix = f"{type(self).__name__}.evaluation."
        datamodule = getattr(trainer, "datamodule", None)
        train = datamodule.sources["train"] if isinstance(datamodule, ContextQueryDataModule) else None
        for task, data in self.evaluation.data.items():
            if isinstance(train, ExampleSource) and isinstance(data, GameSeeds) and (shared := train.overlap(data)):
                raise UserError(f"{prefix}data.{task} and data.train share {shared}; give each its own")
        self._evaluator = Evaluator(self.evaluation, pl_module.student_config, "model.student", prefix)
        for task, count in self._evaluator.answers.items():
            if count < trainer.world_size * self.evaluation.samples:
                raise UserError(f"{prefix}data.{task}: {trainer.world_size} ranks need at least as many rows")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the initial student if `at_start`; in a resumed run, a step that was due and not evaluated."""
        if self._is_due(trainer.global_step) if trainer.global_step else self.at_start:
            self.on_train_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Evaluate every n steps, and after the last one."""
        step = trainer.global_step
        if self._last != step and (self._is_due(step) or step == trainer.estimated_stepping_batches):
            metrics = self._evaluate(trainer, pl_module)
            # For a monitor. The loggers get the metrics at once, whatever trainer.log_every_n_steps is.
            pl_module.log_dict(metrics, logger=False, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate, unless this step has been evaluated."""
        if self._last != trainer.global_step:
            self._evaluate(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the last and the best value; a resumed run that had no step left evaluates here."""
        self.on_train_end(trainer, pl_module)
        last, metrics = self._main[-1]
        for name, value in metrics.items():
            more = self._evaluator.higher_is_better(name.split("/")[1])
            best_of = max if more else min
            step, best = best_of(((step, main[name]) for step, main in self._main), key=lambda pair: pair[1])
            word = "most" if more else "least"
            rank_zero_info(f"{name}: {value:.3f} at the last step, {last}; {word}: {best:.3f} at step {step}")

    def state_dict(self) -> dict[str, Any]:
        """The main metrics so far."""
        return {"main": self._main}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self._main = [(int(step), dict(metrics)) for step, metrics in state_dict["main"]]

    @property
    def _last(self) -> int | None:
        """The step of the last evaluation."""
        return self._main[-1][0] if self._main else None

    def _is_due(self, step: int) -> bool:
        return self.every_n_steps is not None and step % self.every_n_steps == 0

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Evaluate, write and log. Returns the metrics by their full names, on every rank."""
        assert isinstance(pl_module, Distiller)
        results = self._evaluator(self._answering(trainer, pl_module.student))
        accelerator(pl_module.device).trim()
        main = {f"{self.name}/{task}/{self._evaluator.main_metric(task)}" for task in self._evaluator.answers}
        metrics = {}
        for task, result in results.items():
            for metric, value in result.metrics.items():
                name = f"{self.name}/{task}/{metric}"
                metrics[name] = value.value
                if name in main and value.low is not None and value.high is not None:
                    metrics |= {name + "_low": value.low, name + "_high": value.high}
        if trainer.is_global_zero:
            still_there(self._folder.parent)
            self._folder.mkdir(exist_ok=True)
            for task, result in results.items():
                write_rows(self._folder / f"step={trainer.global_step}-{task}.jsonl", result.rows)
        metrics = dict(trainer.strategy.broadcast(metrics))
        self._main.append((trainer.global_step, {name: metrics[name] for name in metrics if name in main}))
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self._main[-1][1].items())
        rank_zero_info(f"step {trainer.global_step}: {shown}")
        return metrics

    def _answering(self, trainer: Trainer, student: Student) -> Student:
        """The student, or a copy if the type differs or the weights are sharded."""
        if self.dtype == "auto":
            return student.plain(computing_dtype(trainer.precision, student.model.dtype))
        dtype: torch.dtype = getattr(torch, self.dtype)
        warn_if_emulated("LMEval.dtype", dtype, student.model.device)
        return student.plain(dtype)
