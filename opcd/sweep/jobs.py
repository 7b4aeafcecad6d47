"""A job is one `opcd` process with a folder of its own; the folder says whether it finished."""

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
"""What is written into a job's folder beside what its process writes."""
RUN = "runs/version_0"  # where `opcd` writes in a job's folder: the former attempt is gone before it starts


@dataclass(frozen=True)
class Job:
    """One process of `opcd`, and what tells that it did all of its work."""

    name: str
    """Its folder, relative to that of the sweep."""
    words: list[str]
    """The words after `opcd`."""
    config: dict[str, Any]
    """What the result depends on: a finished job is not run again while this stays the same."""
    proof: str
    """A path in its folder that exists once the work is done."""
    after: tuple[str, ...] = ()
    """Names of jobs that must finish before."""
    leaves: tuple[str, ...] = ("runs",)
    """Files and folders that its process makes in its folder, the proof apart."""

    @property
    def command(self) -> list[str]:
        """The whole command line."""
        return [sys.executable, "-m", "opcd", *parsing.allowed, *self.words]


def fit_job(name: str, root: Path, words: list[str], config: dict[str, Any]) -> Job:
    """`opcd fit` in the folder `root / name`; it is done when the student is exported."""
    folder = str(root / name / Path(RUN).parent)
    return Job(name, ["fit", *words, "--trainer.default_root_dir", folder], config, f"{RUN}/student")


class JobFolder:
    """Where a job writes: job.json (its command and config), log.txt, what `opcd` leaves, finished.json at the end."""

    def __init__(self, root: Path, job: Job) -> None:
        self.path, self.job = root / job.name, job
        self.log, self.run = self.path / "log.txt", self.path / RUN
        self._finished = self.path / "finished.json"

    def seconds(self) -> float | None:
        """How long the finished job took, or None where it has not finished.

        Raises:
            UserError: it finished with another config, or its files cannot be read.
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
        """A value of one of the files that `begin` and `finish` write. UserError where there is none."""
        note = read_json(self.path / name, self.job.name) if (self.path / name).is_file() else None
        value = note.get(key) if isinstance(note, dict) else None
        if not isinstance(value, kind):
            raise UserError(f"{self.path / name} holds no {key}; delete {self.path} to run {self.job.name} anew")
        return value

    def check(self) -> None:
        """Refuse a folder with files that no former attempt has written: they would be removed.

        Raises:
            UserError: names the folder.
        """
        if self.path.is_symlink():
            raise UserError(f"{self.job.name}: {self.path} is a link; name a new --out")
        require_own(self.path, self.job.name, self._own())

    def _own(self) -> tuple[str, ...]:
        """What a former attempt may have left that was ended before `close`; without job.json there was none."""
        begun, noted = (self.path / "job.json").is_file(), (self.path / MANIFEST).is_file()
        return (*OWN, Path(self.job.proof).parts[0], *self.job.leaves) if begun and not noted else ()

    def begin(self) -> None:
        """An empty folder, less job.json: nothing of a former attempt stays."""
        self.check()
        with explained(self.path):
            remove_own(self.path, self._own())
            self.path.mkdir(parents=True)
        write_atomic(
            self.path / "job.json", json.dumps({"command": self.job.command, "config": self.job.config}, indent=1)
        )

    def close(self) -> None:
        """Note what a failed attempt has left, so that nothing else is removed before the next one."""
        write_manifest(self.path)

    def finish(self, seconds: float) -> None:
        """Mark the job as finished."""
        ended = time.strftime("%Y-%m-%d %H:%M:%S %z")
        write_atomic(self._finished, json.dumps({"seconds": round(seconds, 1), "ended": ended}))

    def proven(self) -> bool:
        """Whether what the job should leave is there."""
        return (self.path / self.job.proof).exists()

    def last_lines(self, count: int) -> list[str]:
        """The end of the log, without blank lines; of a line that rewrites itself, what it says last."""
        if not self.log.exists():
            return []
        with self.log.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - 16384))
            text = stream.read().decode("utf-8", "replace")
        lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
        return [line for line in lines if line.strip()][-count:]
