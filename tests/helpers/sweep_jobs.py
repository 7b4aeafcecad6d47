"""Jobs of a sweep that are a line of Python."""

import sys
from dataclasses import dataclass
from pathlib import Path

from opcd.sweep.job_engine import Engine, locked
from opcd.sweep.jobs import Job
from opcd.sweep.launchers import LocalLauncher


@dataclass(frozen=True)
class Script(Job):
    """A job that is a line of Python in its folder."""

    folder: str = ""

    @property
    def command(self) -> list[str]:
        return [sys.executable, "-c", f"import os, sys, time; os.chdir({self.folder!r}); {self.words[0]}"]


def run(root: Path, jobs: list[Job], at_once: int = 1) -> Engine:
    """Run the jobs, with their processes below this one; returns the engine."""
    with locked(root) as lock:
        engine = Engine(root, LocalLauncher(at_once, lock), at_once)
        engine.add(jobs)
        engine.run()
    return engine
