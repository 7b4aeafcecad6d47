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
"""Steps whose median says how long one takes: a pause or an evaluation among them changes nothing."""
LOGGERS = ("lightning.pytorch", "lightning.fabric")
"""Loggers whose lines would otherwise be written into the bar."""


class StepProgress(ProgressBar):
    """What a run is doing, and how far it is.

    While training: step, divergence in nats a token, tokens a second, response length, share of ended responses, time
    to go. Before it: what is loaded, sample answers, the first pass over a context. In the other commands: batches.

    Args:
        every_n_steps: steps between two lines where the output is no terminal.
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
        """Lightning silences all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show what is being done from here on: models are loaded next."""
        super().setup(trainer, pl_module, stage)
        show_activity(self._show)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Show no more."""
        self._close()
        hide_activity(self._show)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where there is a terminal."""
        self._ends.clear()
        self._open(_total(trainer), trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Say that the first step has begun: it may take long, and ends with the first figures."""
        if not self._ends:
            doing("first step")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the step that has just ended."""
        step, total = trainer.global_step, _total(trainer)
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
        """Open a bar of batches, where validation is all there is."""
        if trainer.state.fn == "validate":
            self._open(_batches(trainer.num_val_batches))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count a batch."""
        self._batch(trainer, "held-out queries", _batches(trainer.num_val_batches), args[2])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar that validation has opened."""
        if trainer.state.fn == "validate":
            self._close()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar of batches."""
        self._open(_batches(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count a batch."""
        self._batch(trainer, "test queries", _batches(trainer.num_test_batches), args[2])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open a bar of batches."""
        self._open(_batches(trainer.num_predict_batches))

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Count a batch."""
        self._batch(trainer, "answers", _batches(trainer.num_predict_batches), args[2])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()
        hide_activity(self._show)

    def _open(self, total: int | None, completed: int = 0) -> None:
        console = Screen()
        if not (self._enabled and console.is_terminal):
            return
        self._close()
        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}", markup=False))
        # Messages stand above the bar: what is a file stays one.
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
        """In the bar how far it is, too; a line says each thing once."""
        if self._bar is not None:
            self._bar.update(self._task, description=f"{what} {how_far}".rstrip())
        elif self._enabled and what != self._doing:
            print(what, flush=True)
        self._doing = what

    def _batch(self, trainer: Trainer, what: str, total: int | None, number: int) -> None:
        if self._bar is not None and trainer.state.fn != "fit":
            self._bar.update(self._task, completed=number + 1, description=what)
        elif self._bar is not None:
            doing(what, f"{number + 1}/{total or '?'}")
        elif self._enabled and trainer.state.fn != "fit":
            print(f"{what}: batch {number + 1}/{total or '?'}", flush=True)
            self._doing = ""

    def _describe(self, metrics: dict[str, Any], step: int, total: int | None) -> str:
        shown = {name: float(value) for name, value in metrics.items()}
        text = (
            f"{shown['train/divergence']:.4f} nats/token  {shown['train/tokens_per_s']:.0f} tokens/s  "
            f"{shown['train/response_tokens']:.0f} tokens a response, {shown['train/finished_fraction']:.0%} ended  "
            f"{self._left(step, total)} to go"
        )
        held_out = f"  held out {shown['val/divergence']:.4f}" if "val/divergence" in shown else ""
        return text + held_out

    def _left(self, step: int, total: int | None) -> str:
        """Minutes and seconds of the steps that are left, each as long as the median of the last ones.

        The first step reads weights and encodes contexts, and says nothing about the others.
        """
        if total is None or len(self._ends) < 2:
            return "?"
        ends = list(self._ends)
        one = statistics.median(after - before for before, after in pairwise(ends))
        minutes, seconds = divmod(int(one * (total - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _total(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, or None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps not in (-1, float("inf")) else None


def _batches(counts: Any) -> int | None:
    """Batches of all loaders, or None where that is not known."""
    total = sum(counts) if isinstance(counts, list) else counts
    return None if total == float("inf") else int(total)
