"""Evaluation with lm-eval inside training, which does not notice it."""

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
    """Asks the student the questions of an evaluation, every so many steps and at the end of training.

    The metrics go to the loggers (`metrics.csv` among them) as `eval/TASK/METRIC`, where a ModelCheckpoint can monitor
    them, the bounds of the first one's 95 % interval as `METRIC_low` and `METRIC_high`, and every answer to
    `eval/step=N-TASK.jsonl` in the run's folder. Training is bit for bit what it is without:
    the generators, the modes of all modules, weights and tokenizer are left as they were.

    Keep rows that choose a checkpoint apart from those that are reported: name validation rows in `evaluation.data`
    where `eval/...` is monitored, and give the chosen student's folder and the test rows to `opcd evaluate`.

    Under several ranks each answers its share of the questions.

    Args:
        evaluation: what to ask, and how the answers are drawn.
        every_n_steps: optimizer steps between two evaluations; null evaluates at the end only.
        at_start: evaluate before the first step as well.
        dtype: type of the weights that answer. auto: bfloat16 where the trainer computes in it (a copy of the master
            weights, as the exported student has them), else the student's own.
        name: the first part of the metrics' names and the folder of the answers; two callbacks need two.
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
            raise ValueError(f"LMEval wants every_n_steps >= 1 or null, got {every_n_steps}")
        if not name or "/" in name:
            raise ValueError(f"LMEval wants a name without a slash, got {name!r}")
        self.evaluation, self.every_n_steps, self.at_start = evaluation, every_n_steps, at_start
        self.dtype, self.name = dtype, name
        self._main: list[tuple[int, dict[str, float]]] = []

    @property
    def state_key(self) -> str:
        """Two of them in one trainer are told apart by their names."""
        return f"{type(self).__name__}({self.name})"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Read tasks and rows, and check them, before a model is loaded."""
        if stage != "fit":
            return
        assert isinstance(pl_module, Distiller)
        self._folder = run_folder(trainer) / self.name
        prefix = f"{type(self).__name__}.evaluation."
        self._refuse_trained(getattr(trainer, "datamodule", None), prefix)
        self._evaluator = Evaluator(self.evaluation, pl_module.student_config, "model.student", prefix)
        for task, count in self._evaluator.answers.items():
            if count < trainer.world_size * self.evaluation.samples:
                raise UserError(f"{prefix}data.{task}: {trainer.world_size} ranks want as many rows at least")

    def _refuse_trained(self, datamodule: Any, prefix: str) -> None:
        """Games that are measured must not be those that are trained on."""
        train = datamodule.sources["train"] if isinstance(datamodule, ContextQueryDataModule) else None
        for task, data in self.evaluation.data.items():
            shared = train.overlap(data) if isinstance(train, ExampleSource) and isinstance(data, GameSeeds) else None
            if shared is not None:
                raise UserError(f"{prefix}data.{task} and data.train share {shared}; give each its own")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the student that training begins with, where asked, or what a signal kept a run from evaluating."""
        step = trainer.global_step
        due = _due(step, self.every_n_steps) if step else self.at_start
        if due and self._last != step:
            self._log(trainer, self._evaluate(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Evaluate every n steps, and after the last one."""
        step = trainer.global_step
        if self._last != step and (_due(step, self.every_n_steps) or step == trainer.estimated_stepping_batches):
            metrics = self._evaluate(trainer, pl_module)
            # For a monitor; the loggers are told directly, whatever trainer.log_every_n_steps is.
            pl_module.log_dict(metrics, logger=False, batch_size=1)
            self._log(trainer, metrics)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a student whose training ended before its time."""
        self._evaluate_last(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same where a run that went on had no step left: the one before was kept from evaluating its last."""
        self._evaluate_last(trainer, pl_module)
        last, metrics = self._main[-1]
        for name, value in metrics.items():
            more = self._evaluator.higher_is_better(name.split("/")[1])
            best_of = max if more else min
            step, best = best_of(((step, main[name]) for step, main in self._main), key=lambda pair: pair[1])
            word = "most" if more else "least"
            rank_zero_info(f"{name}: {value:.3f} at the last step, {last}; {word}: {best:.3f} at step {step}")

    def _evaluate_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._last != trainer.global_step:
            self._log(trainer, self._evaluate(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """What was measured so far, for a run that goes on."""
        return {"main": self._main}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self._main = [(int(step), dict(metrics)) for step, metrics in state_dict["main"]]

    @property
    def _last(self) -> int | None:
        return self._main[-1][0] if self._main else None

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """The metrics by their whole names, on every rank."""
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
        return metrics

    def _answering(self, trainer: Trainer, student: Student) -> Student:
        """The student itself, or a copy: in another type, or whole where its weights are sharded."""
        own: torch.dtype = student.model.dtype
        auto = computing_dtype(trainer.precision, own)
        if self.dtype == "auto":
            return student.plain(auto)
        dtype: torch.dtype = getattr(torch, self.dtype)
        warn_if_emulated("LMEval.dtype", dtype, student.model.device)
        return student.plain(dtype)

    def _log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        shown = "  ".join(f"{name} {value:.3f}" for name, value in self._main[-1][1].items())
        rank_zero_info(f"step {trainer.global_step}: {shown}")


def _due(step: int, every_n_steps: int | None) -> bool:
    return every_n_steps is not None and step % every_n_steps == 0
