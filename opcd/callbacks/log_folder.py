"""The folder of a run."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from opcd.runtime.files.disk import append_lines, explained, whole


def run_folder(trainer: Trainer) -> Path:
    """The absolute folder of the first logger, or else `trainer.default_root_dir`; the same on all ranks.

    This is a collective call: every rank must make it, for example in `Callback.setup`.
    """
    folder = whole(Path(trainer.log_dir or trainer.default_root_dir))
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def still_there(folder: Path) -> None:
    """Create a run's folder again if somebody has removed it, with a warning.

    Raises:
        DiskError: the folder cannot be created.
    """
    if folder.is_dir():
        return
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    rank_zero_warn(
        f"{folder} was removed while the run was writing to it: the files in it are lost. The folder is created again "
        "and the run continues"
    )


def append_rows(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append rows as JSON lines to a file of the run's folder, which is created again if it was removed."""
    still_there(file.parent)
    append_lines(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class RunLogger(CSVLogger):
    """A CSVLogger that writes metrics.csv in the run's folder and creates the folder again if it was removed."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)
        self._folder = folder

    @rank_zero_only
    def save(self) -> None:
        """Write the new lines."""
        still_there(self._folder)
        with explained(self._folder / "metrics.csv"):
            super().save()
