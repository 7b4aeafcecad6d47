"""Jobs: each is one `opcd` process with a folder of its own, which records whether it finished."""

import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.config import parsing
from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import MANIFEST, explained, remove_own, require_own, write_atomic, write_manifest
from opcd.runtime.files.user_files import read_json

OWN = ("job.json", "log.txt", "finished.json")
"""Files that the engine writes into a job's folder."""
RUN = "runs/version_0"
"""The run in a job's folder. A former attempt is removed before the job starts."""


@dataclass(frozen=True)
class Job:
    """One process of `opcd`, and the proof that it did all of its work."""

    name: str
    """The job's folder, relative to the sweep's."""
    words: list[str]
    """The words after `opcd`."""
    config: dict[str, Any]
    """The values that the result depends on. A finished job does not run again with the same config."""
    proof: str
    """A path in the job's folder that exists once the work is done."""
    after: tuple[str, ...] = ()
    """Names of jobs that must finish first."""
    leaves: tuple[str, ...] = ("runs",)
    """Other files and folders that the process makes in the job's folder."""

    @property
    def command(self) -> list[str]:
        """The command line."""
        return [sys.executable, "-m", "opcd", *parsing.allowed, *self.words]


def fit_job(name: str, root: Path, words: list[str], config: dict[str, Any]) -> Job:
    """A job of `opcd fit` in the folder `root / name`. The exported student is the proof."""
    folder = str(root / name / Path(RUN).parent)
    return Job(name, ["fit", *words, "--trainer.default_root_dir", folder], config, f"{RUN}/student")


class JobFolder:
    """The folder of a job: job.json (command and config), log.txt, the files of `opcd`, finished.json at the end."""

    def __init__(self, root: Path, job: Job) -> None:
        self.path, self.job = root / job.name, job
        self.log, self.run = self.path / "log.txt", self.path / RUN
        self._finished = self.path / "finished.json"

    def seconds(self) -> float | None:
        """The seconds that a finished job took; None if it has not finished.

        Raises:
            UserError: the job finished with another config, or its files cannot be read.
        """
        if not self._finished.exists():
            return None
        then, seconds = self._noted("job.json", "config", dict), self._noted("finished.json", "seconds", int | float)
        if changed := changed_keys(then, json.loads(json.dumps(self.job.config))):
            shown = ", ".join(changed[:3]) + ", ..." * (len(changed) > 3)
            raise UserError(
                f"{self.job.name} finished with another config ({shown}); "
                f"choose another --out, or delete {self.path} to run it anew"
            )
        return float(seconds)

    def _noted(self, name: str, key: str, kind: Any) -> Any:
        """A value in a file of `begin` or `finish`. UserError if it is missing."""
        note = read_json(self.path / name, self.job.name) if (self.path / name).is_file() else None
        value = note.get(key) if isinstance(note, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{self.path / name} holds no {key}; delete {self.path} to run {self.job.name} anew")
        return value

    def check(self) -> None:
        """Check that the folder has only files of former attempts, which will be removed.

        Raises:
            UserError: names the folder.
        """
        if self.path.is_symlink():
            raise UserError(f"{self.job.name}: {self.path} is a link; name a new --out")
        require_own(self.path, self.job.name, self._own())

    def _own(self) -> tuple[str, ...]:
        """Names that an attempt left if it ended before `close`. Without job.json there was no attempt."""
        begun, noted = (self.path / "job.json").is_file(), (self.path / MANIFEST).is_file()
        return (*OWN, Path(self.job.proof).parts[0], *self.job.leaves) if begun and not noted else ()

    def begin(self) -> None:
        """Make the folder, with job.json and nothing of a former attempt."""
        self.check()
        with explained(self.path):
            remove_own(self.path, self._own())
            self.path.mkdir(parents=True)
        write_atomic(
            self.path / "job.json", json.dumps({"command": self.job.command, "config": self.job.config}, indent=1)
        )

    def close(self) -> None:
        """Note the files of a failed attempt, so that the next one removes no others."""
        write_manifest(self.path)

    def finish(self, seconds: float) -> None:
        """Mark the job as finished."""
        ended = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_atomic(self._finished, json.dumps({"seconds": round(seconds, 1), "ended": ended}))

    def proven(self) -> bool:
        """Whether the job's proof exists."""
        return (self.path / self.job.proof).exists()

    def last_lines(self, count: int) -> list[str]:
        """The last lines of the log that are not blank. Of a line that rewrites itself, the last text."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 16384))
            text = stream.read().decode("utf-8", "replace")
        lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
        return [line for line in lines if line.strip()][-count:]
