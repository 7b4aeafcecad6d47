"""A clean end on SIGTERM, SIGINT (Ctrl-C) and SIGUSR1: a checkpoint, then an exit code."""

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
"""Seconds in which signals count as one: a process group, torchrun and rank 0 may all forward the same one."""


class LeaveOnSignal(Callback):
    """Ends the run on a signal, within the step: `SaveCheckpoints` then saves the state before that step.

    The exit code is 143, or 130 after SIGINT. A second signal ends the process at once. All ranks stop at the same
    step. Under SLURM, SIGUSR1 before the time limit (`#SBATCH --signal=USR1@120`) requeues the job.
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._told_at = 0.0

    @property
    def has_listened(self) -> bool:
        """Whether the run got as far as handling signals, so that there is something to save."""
        return self._trainer is not None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers. They replace Lightning's own, which wait for the end of a batch."""
        if threading.current_thread() is threading.main_thread():
            self._trainer = trainer
            interruption.reset(apart=trainer.world_size == 1)
            for number in _signals(trainer):
                signal.signal(number, self._told)

    on_test_start = on_predict_start = on_train_start

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, unless training has done so."""
        if trainer.state.fn == "validate":
            self.on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the next signal end the process at once: the rest of the run is short and cannot be resumed."""
        if threading.current_thread() is threading.main_thread():
            interruption.reset()
            for number in _signals(trainer):
                # On several ranks, a Python handler would not run while the rank waits in a collective.
                signal.signal(number, interruption.leave if trainer.world_size == 1 else signal.SIG_DFL)

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
        if number != signal.SIGINT and hasattr(launcher, "procs"):  # Ctrl-C reaches these ranks by itself
            launcher.kill(number)
        name = signal.Signals(number).name
        how = "leaving with a checkpoint" if self._trainer.state.fn == "fit" else "leaving"
        os.write(2, f"\n{name}: {how}; a second signal ends the run at once\n".encode())


def _signals(trainer: Trainer) -> list[signal.Signals]:
    return [signal.SIGTERM, signal.SIGINT, requeue_signal(trainer)]
