"""The schedule of checkpoints: when one is saved, and which ones are kept."""

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
    """Saves `checkpoints/step=N.ckpt` in the run's folder every n steps, after the last step, and on interruption.

    Args:
        every_n_steps: optimizer steps between two checkpoints.
        keep: number of checkpoints to keep, the newest ones. An old one is removed after a newer one is complete. With
            1, there is no fallback if the disk damages that file.
        disk_full: when the disk is full, `stop` ends the run with an error; `go_on` continues training and tries again
            at the next checkpoint.
    """

    def __init__(self, every_n_steps: int = 100, keep: int = 2, disk_full: Literal["stop", "go_on"] = "stop") -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"SaveCheckpoints needs every_n_steps >= 1 and keep >= 1, got {every_n_steps}, {keep}")
        self.every_n_steps, self.keep, self.disk_full = every_n_steps, keep, disk_full
        self.saved: list[Path] = []
        self._state = (0, 0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder to write."""
        self._folder = run_folder(trainer) / "checkpoints"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do not save the initial state: it is reproducible, or a checkpoint already."""
        self._state = _state(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save every n steps and after the last one."""
        step = trainer.global_step
        if step % self.every_n_steps == 0 or step == trainer.estimated_stepping_batches:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training ended early, and report the disk space that the checkpoints take."""
        self.save(trainer)
        if sizes := [path.stat().st_size for path in self.saved if path.is_file()]:
            rank_zero_info(
                f"checkpoints: {sum(sizes) / 1e9:.2g} GB in {self._folder}, to resume training; "
                "--trainer.enable_checkpointing false saves none"
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before an interrupted or abandoned step, which has not changed the weights."""
        if trainer.state.fn != "fit" or not isinstance(exception, Interrupted | StepAbandoned):
            return
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.completed < batches.processed:  # the finished step has not logged its metrics
            trainer._logger_connector.update_train_step_metrics()
        if trainer.validating:  # save again, else a resumed run would skip this validation
            self._state = (-1, -1)
        if self.save(trainer) is not None:
            rank_zero_info(f"the state before the interrupted step is in {self.saved[-1]}")
        requeue(trainer, exception)

    def save(self, trainer: Trainer) -> Path | None:
        """Save the current state unless it is saved already. Every rank must call this.

        Returns:
            The path of the newest checkpoint, or None if the disk was full.

        Raises:
            DiskFull: the disk is full, and `disk_full` is stop.
            DiskError: the file cannot be written.
        """
        if self._state == _state(trainer) or getattr(trainer, "fast_dev_run", False):
            return self.saved[-1] if self.saved else None
        path, problem = self._folder / f"step={trainer.global_step}.ckpt", ("", False)
        try:
            if trainer.is_global_zero:
                still_there(self._folder.parent)
            trainer.save_checkpoint(path, weights_only=False)  # explicit, or Lightning warns
        except DiskError as error:  # on the writing rank only; the others are in this barrier
            problem = str(error), isinstance(error, DiskFull)
            trainer.strategy.barrier("Trainer.save_checkpoint")
        message, full = trainer.strategy.broadcast(problem)
        if message:
            if not full or self.disk_full == "stop":
                raise (DiskFull if full else DiskError)(message)
            rank_zero_warn(f"{message}. Training continues without this checkpoint (disk_full: go_on)")
            return None
        self._state = _state(trainer)
        self.saved = [*(other for other in self.saved if other != path), path]
        while len(self.saved) > self.keep:
            trainer.strategy.remove_checkpoint(self.saved.pop(0))
        return path


def _state(trainer: Trainer) -> tuple[int, int]:
    """The numbers of optimizer steps and of batches; a skipped batch makes no step."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.total
    return trainer.global_step, batches.processed
