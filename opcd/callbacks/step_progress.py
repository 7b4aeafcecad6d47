"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import logging
import statistics
import sys
import time
from collections import deque
from itertools import pairwise
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from opcd.runtime.interruption import doing, hide_activity, show_activity
from opcd.runtime.output import Screen

LAST = 9
"""Number of recent steps whose median gives the time of one: a pause or an evaluation does not change it."""
LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Loggers whose lines would otherwise be written into the bar."""


class StepProgress(ProgressBar):
    """Shows what a run is doing, and its progress.

    In training: step, divergence in nats per token, tokens per second, response length, share of responses that ended,
    and remaining time. Before training: models that are loaded, sample answers, the first pass over a context. In the
    other commands: batches.

    Args:
        every_n_steps: steps between two lines if the output is not a terminal.
    """

    def __init__(self, every_n_steps: int = 10) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._ends: deque[float] = deque(maxlen=LAST + 1)
        self._doing = ""
        self._streams: list[tuple[logging.StreamHandler[Any], Any]] = []

    def disable(self) -> None:
        """Show nothing: Lightning calls this on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show activities from here on: models are loaded next."""
        super().setup(trainer, pl_module, stage)
        show_activity(self._show)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar and stop showing activities."""
        self._close()
        hide_activity(self._show)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar and stop showing activities."""
        self.teardown(trainer, pl_module, "")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar of steps."""
        self._ends.clear()
        self._open(_steps(trainer), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say that the first step has begun: it may take long, and only its end has figures."""
        if not self._ends:
            doing("first step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the step that has just ended."""
        step, total = trainer.global_step, _steps(trainer)
        first = not self._ends
        self._ends.append(time.perf_counter())
        text = self._describe(trainer.progress_bar_metrics, step, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._enabled and (first or step % self.every_n_steps == 0 or step == total):
            print(f"step {step}/{total or '?'}  {text}", flush=True)
        self._doing = ""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar of batches, unless training has its bar."""
        if trainer.state.fn != "fit":
            self._open(_batches(trainer)[1])

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        (what, total), done = _batches(trainer), batch_idx + 1
        if self._bar is not None and trainer.state.fn != "fit":
            self._bar.update(self._task, completed=done, description=what)
        elif self._bar is not None:
            doing(what, f"{done}/{total or '?'}")
        elif self._enabled and trainer.state.fn != "fit":
            print(f"{what}: batch {done}/{total or '?'}", flush=True)
            self._doing = ""

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar of batches."""
        if trainer.state.fn != "fit":
            self._close()

    on_test_end = on_predict_end = on_validation_end

    def _open(self, total: int | None, completed: int = 0) -> None:
        console = Screen()
        if not (self._enabled and console.is_terminal):
            return
        self._close()
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        # Messages stand above the bar, but standard error that goes to a file stays there.
        self._bar = Progress(*columns, console=console, redirect_stderr=sys.stderr.isatty())
        self._task = self._bar.add_task("", total=total, completed=completed)
        self._bar.start()
        for handler in (handler for name in LOGGERS for handler in logging.getLogger(name).handlers):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                self._streams.append((handler, handler.setStream(sys.stderr)))

    def _close(self) -> None:
        for handler, stream in self._streams:
            if stream is not None:
                handler.setStream(stream)
        self._streams.clear()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(self, what: str, how_far: str) -> None:
        """Show an activity: in the bar with its progress, else as one line when it begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{what} {how_far}".rstrip())
        elif self._enabled and what != self._doing:
            print(what, flush=True)
        self._doing = what

    def _describe(self, metrics: dict[str, Any], step: int, total: int | None) -> str:
        shown = {name: float(value) for name, value in metrics.items()}
        held_out = f"  held out {shown['val/divergence']:.4f}" if "val/divergence" in shown else ""
        if "context/recovery" in shown:
            held_out += f"  {shown['context/recovery']:.0%} recovered"
        if "context/drift" in shown:
            held_out += f"  drift {shown['context/drift']:.3f}"
        return (
            f"{shown['train/divergence']:.4f} nats/token  {shown['train/tokens_per_s']:.0f} tokens/s  "
            f"{shown['train/response_tokens']:.0f} tokens a response, {shown['train/finished_fraction']:.0%} ended  "
            f"{self._left(step, total)} to go{held_out}"
        )

    def _left(self, step: int, total: int | None) -> str:
        """Minutes and seconds of the remaining steps, from the median time of the last ones.

        The first step also loads weights and encodes contexts, so its time is not used.
        """
        if total is None or len(self._ends) < 2:
            return "?"
        one = statistics.median(after - before for before, after in pairwise(self._ends))
        minutes, seconds = divmod(int(one * (total - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, or None if there is no limit."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps not in (-1, float("inf")) else None


def _batches(trainer: Trainer) -> tuple[str, int | None]:
    """The content of a command's batches and their number, None if unknown; in training, those of validation."""
    if trainer.state.fn == "test":
        what, counts = "test queries", trainer.num_test_batches
    elif trainer.state.fn == "predict":
        what, counts = "answers", trainer.num_predict_batches
    else:
        what, counts = "held-out queries", trainer.num_val_batches
    total = sum(counts) if isinstance(counts, list) else counts
    return what, None if total == float("inf") else int(total)
