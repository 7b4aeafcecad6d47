"""The folder of a run."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from opcd.runtime.files.disk import explained, whole


def run_folder(trainer: Trainer) -> Path:
    """The folder that the first logger writes to, or else `trainer.default_root_dir`; the same on all ranks.

    A collective call: every rank must make it, which `Callback.setup` is the place for. The path is from the root: the
    working folder may be removed.
    """
    folder = whole(Path(trainer.log_dir or trainer.default_root_dir))
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def still_there(folder: Path) -> None:
    """Make a run's folder anew where somebody has removed it, and say so.

    Raises:
        DiskError: it cannot be made.
    """
    if folder.is_dir():
        return
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rank_zero_warn(
        f"{folder} was removed while the run was at work: what had been written there is lost. The folder is made "
        "anew, and the run goes on"
    )


class RunLogger(CSVLogger):
    """metrics.csv in the run's folder, also where somebody has removed the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self._folder = folder

    @rank_zero_only
    def save(self) -> None:
        """Write what is new."""
        still_there(self._folder)
        with explained(self._folder / "metrics.csv"):
            super().save()
