"""SIGTERM, SIGINT (Ctrl-C) and SIGUSR1: a checkpoint, then the end."""

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from opcd.callbacks.slurm import requeue_signal
from opcd.runtime import interruption

SAME = 1.0
"""Seconds in which signals count as one: a process group, torchrun and rank 0 may all pass on the same."""


class LeaveOnSignal(Callback):
    """Ends a run that is told to, within the step: `SaveCheckpoints` then saves the state before that step.

    The exit code is 143, or 130 after SIGINT. A second signal ends the process at once. All ranks leave at the same
    step. Under SLURM, SIGUSR1 before the time limit (`#SBATCH --signal=USR1@120`) puts the job back into the queue.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._told_at = 0.0

    @property
    def has_listened(self) -> bool:
        """Whether the run came so far that there is something to keep."""
        return self._trainer is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen. Lightning's own handlers, which wait for the end of a batch, are replaced."""
        self._listen(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        if trainer.state.fn == "validate":
            self._listen(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen."""
        self._listen(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is left to do is short, and the run would not be whole without it: a signal now ends it at once."""
        if threading.current_thread() is threading.main_thread():
            interruption.reset()
            for number in _signals(trainer):
                # Of several ranks, one that waits for the others in a collective would not get to it.
                signal.signal(number, interruption.leave if trainer.world_size == 1 else signal.SIG_DFL)

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._trainer = trainer
        interruption.reset(apart=trainer.world_size == 1)
        for number in _signals(trainer):
            signal.signal(number, self._told)

    def _told(self, number: int, frame: FrameType | None) -> None:
        if interruption.asked():
            if time.monotonic() - self._told_at < SAME:
                return
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        interruption.ask(number)
        self._told_at = time.monotonic()
        assert self._trainer is not None
        launcher: Any = self._trainer.strategy.launcher
        if number != signal.SIGINT and hasattr(launcher, "procs"):  # ranks of our own; Ctrl-C reaches them by itself
            launcher.kill(number)
        name = signal.Signals(number).name
        how = "leaving with a checkpoint" if self._trainer.state.fn == "fit" else "leaving"
        os.write(2, f"\n{name}: {how}; once more ends at once\n".encode())


def _signals(trainer: Trainer) -> list[signal.Signals]:
    return [signal.SIGTERM, signal.SIGINT, requeue_signal(trainer)]
