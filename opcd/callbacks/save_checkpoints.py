"""When checkpoints are saved, and which are kept."""

from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.callbacks.log_folder import run_folder, still_there
from opcd.callbacks.slurm import requeue
from opcd.runtime.errors import StepAbandoned
from opcd.runtime.files.disk import DiskError, DiskFull
from opcd.runtime.interruption import Interrupted


class SaveCheckpoints(Checkpoint):
    """Saves `checkpoints/step=N.ckpt` in the run's folder every n steps, after the last, and where a run is stopped.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: how many of the newest are kept; an older one is removed after a newer one is whole. With 1, there is
            nothing to fall back to where a disk has damaged it.
        disk_full: stop ends the run with one message; go_on trains on and tries again when the next one is due.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2, disk_full: Literal["stop", "go_on"] = "stop") -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"SaveCheckpoints wants every_n_steps >= 1 and keep >= 1, got {every_n_steps}, {keep}")
        self.every_n_steps, self.keep, self.disk_full = every_n_steps, keep, disk_full
        self.saved: list[Path] = []
        self._state = (0, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where to write."""
        self._folder = run_folder(trainer) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What a run begins with is saved elsewhere, or needs not be."""
        self._state = _state(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save where one is due."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.estimated_stepping_batches:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save a run that ended before its time, and say what all of them take."""
        self.save(trainer)
        if sizes := [path.stat().st_size for path in self.saved if path.is_file()]:
            rank_zero_info(
                f"checkpoints: {sum(sizes) / 1e9:.2g} GB in {self._folder}, to go on training; "
                "--trainer.enable_checkpointing false saves none"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what stood before a step that was left: its weights are unchanged."""
        if trainer.state.fn != "fit" or not isinstance(exception, Interrupted | StepAbandoned):
            return
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.completed < batches.processed:  # a step is done, and its metrics would not be logged any more
            trainer._logger_connector.update_train_step_metrics()
        if trainer.validating:  # else a run that goes on would leave out the validation of a step that is saved
            self._state = (-1, -1)
        if self.save(trainer) is not None:
            rank_zero_info(f"the state before the step that was left is in {self.saved[-1]}")
        requeue(trainer, exception)

    def save(self, trainer: Trainer) -> Path | None:
        """Save the state of now where it is not saved; on every rank. The path, or None where there was no room.

        Raises:
            DiskFull: there is no room, and `disk_full` says stop.
            DiskError: the system refuses.
        """
        if self._state == _state(trainer) or getattr(trainer, "fast_dev_run", False):
            return self.saved[-1] if self.saved else None
        path, problem = self._folder / f"step={trainer.global_step}.ckpt", ("", False)
        try:
            if trainer.is_global_zero:
                still_there(self._folder.parent)
            trainer.save_checkpoint(path, weights_only=False)  # said, so that Lightning does not say it
        except DiskError as error:  # on the rank that writes; the others wait for it
            problem = str(error), isinstance(error, DiskFull)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        message, full = trainer.strategy.broadcast(problem)
        if message:
            if not full or self.disk_full == "stop":
                raise (DiskFull if full else DiskError)(message)
            rank_zero_warn(f"{message}. Training goes on without it (disk_full: go_on)")
            return None
        self._state = _state(trainer)
        self.saved = [*(other for other in self.saved if other != path), path]
        while len(self.saved) > self.keep:
            trainer.strategy.remove_checkpoint(self.saved.pop(0))
        return path


def _state(trainer: Trainer) -> tuple[int, int]:
    """Optimizer steps, and batches: a batch may be passed over without a step."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.global_step, batches.processed
