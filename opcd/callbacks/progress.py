"""Progress of a run: a bar on a terminal, plain lines elsewhere."""

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from opcd.output import Screen


class StepProgress(ProgressBar):
    """Step, divergence in nats a token, tokens a second, response length, share of ended responses, time to go.

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
        self._start: tuple[float, int] | None = None

    def disable(self) -> None:
        """Lightning silences all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Undo `disable`."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar where there is a terminal."""
        self._start = None
        console = Screen()
        if self._enabled and console.is_terminal:
            columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("", total=_total(trainer), completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the step that has just ended."""
        step, total = trainer.global_step, _total(trainer)
        # The first step reads weights and encodes contexts: it says nothing about how long the others take.
        first = self._start is None
        self._start = self._start or (time.perf_counter(), step)
        text = self._describe(trainer.progress_bar_metrics, step, total)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif self._enabled and (first or step % self.every_n_steps == 0 or step == total):
            print(f"step {step}/{total or '?'}  {text}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _describe(self, metrics: dict[str, Any], step: int, total: int | None) -> str:
        shown = {name: float(value) for name, value in metrics.items()}
        text = (
            f"{shown['train/divergence']:.4f} nats/token  {shown['train/tokens_per_s']:.0f} tokens/s  "
            f"{shown['train/response_tokens']:.0f} tokens a response, {shown['train/ended']:.0%} ended  "
            f"{self._left(step, total)} to go"
        )
        held_out = f"  held out {shown['val/divergence']:.4f}" if "val/divergence" in shown else ""
        return text + held_out

    def _left(self, step: int, total: int | None) -> str:
        """Minutes and seconds of the steps that are left, at the pace of those after the first."""
        begun, first = self._start or (0.0, step)
        if total is None or step == first:
            return "?"
        minutes, seconds = divmod(int((time.perf_counter() - begun) / (step - first) * (total - step)), 60)
        return f"{minutes}:{seconds:02d}"


def _total(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, or None where it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if steps not in (-1, float("inf")) else None
