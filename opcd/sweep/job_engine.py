"""An engine that runs jobs in parallel and in order, and continues where a former run of the folder stopped."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from opcd.results.run_files import clock
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import explained, open_own, require_own
from opcd.runtime.files.locks import owner_in_words, sign, take
from opcd.runtime.interruption import leaving_at_once
from opcd.sweep.jobs import Job, JobFolder
from opcd.sweep.launchers import LocalLauncher, Running

Status = Literal["waiting", "running", "finished", "failed", "not run"]
POLL_SECONDS = 0.5
LOCK = ".lock"
"""The lock file of a folder of jobs: it is held while one of them runs, and names its owner."""


@dataclass
class Task:
    """A job and its state."""

    job: Job
    folder: JobFolder
    status: Status = "waiting"
    begun: float = 0.0
    seconds: float = 0.0
    """How long it ran, in the former run if `before`."""
    before: bool = False
    """Whether a former run of the sweep finished it."""
    code: int | None = None
    """The exit code of a failed job."""
    slot: int = 0
    running: Running | None = None


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Lock a folder for this process and those that it starts. Yields the file descriptor that holds the lock.

    The lock ends with the last of these processes, so a killed sweep cannot start again beside a run that it left.
    The lock file also marks the folder as one of this program's.

    Raises:
        UserError: the folder cannot be made, holds other files, or is locked by another process.
    """
    file = folder / LOCK
    if not file.exists():
        require_own(folder, "--out")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_own(file, os.O_RDWR)
    try:
        if not take(descriptor, file):
            raise UserError(
                f"--out: {folder} is in use: by another sweep or experience run, or by a job that a killed one left "
                f"behind ({owner_in_words(descriptor)}); wait for it or end it, or choose another --out"
            )
        sign(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


class Engine:
    """An engine that runs jobs, each in a folder of its own.

    Args:
        root: the parent of the jobs' folders.
        launcher: starts the processes.
        jobs: most jobs that run at the same time.
    """

    def __init__(self, root: Path, launcher: LocalLauncher, jobs: int) -> None:
        self.root, self.launcher, self.jobs = root, launcher, jobs
        self.on_finish: Callable[[], None] = lambda: None
        """Called after each finished job."""
        self.tasks: dict[str, Task] = {}

    def add(self, jobs: Sequence[Job]) -> list[Task]:
        """Add jobs. Those that a former run finished are not run again.

        Raises:
            UserError: a job finished with another config.
        """
        added = []
        for job in jobs:
            task = Task(job, JobFolder(self.root, job))
            seconds = task.folder.seconds()
            if seconds is None:
                task.folder.check()
            else:
                task.seconds, task.before = seconds, True
                _set(task, "finished")
            added.append(task)
        self.tasks |= {task.job.name: task for task in added}
        return added

    def run(self) -> None:
        """Run all waiting jobs. An exception or a signal ends their processes too."""
        with leaving_at_once(signal.SIGTERM, handler=signal.default_int_handler):  # as Ctrl-C
            try:
                while self._step():
                    time.sleep(POLL_SECONDS)
            finally:
                left = [task.running for task in self._with("running") if task.running is not None]
                for running in left:
                    running.send(signal.SIGTERM)  # Lightning ends its step first
                for running in left:
                    running.end()

    def failed(self) -> list[Task]:
        """The tasks that failed."""
        return self._with("failed")

    def _step(self) -> bool:
        """Collect jobs that ended and start jobs that can. Returns whether there is more to do."""
        for task in self._with("running"):
            self._collect(task)
        for task in self._with("waiting"):
            before = [self.tasks[name].status for name in task.job.after]
            if any(status in ("failed", "not run") for status in before):
                _set(task, "not run")
            elif all(status == "finished" for status in before) and len(self._with("running")) < self.jobs:
                self._start(task)
        return bool(self._with("running", "waiting"))

    def _start(self, task: Task) -> None:
        taken = {other.slot for other in self._with("running")}
        task.slot = next(slot for slot in range(self.jobs) if slot not in taken)
        task.folder.begin()
        task.running = self.launcher.start(task.folder, task.slot)
        task.begun = time.monotonic()
        _set(task, "running")

    def _collect(self, task: Task) -> None:
        assert task.running is not None
        task.seconds, task.code = time.monotonic() - task.begun, task.running.code()
        if task.code is None:
            return
        if task.code == 0 and task.folder.proven():
            _set(task, "finished")
            task.folder.finish(task.seconds)
            self.on_finish()
        else:
            _set(task, "failed")
            task.folder.close()

    def _with(self, *statuses: Status) -> list[Task]:
        return [task for task in self.tasks.values() if task.status in statuses]


def _set(task: Task, status: Status) -> None:
    """Change the status of a task, and print it."""
    task.status = status
    took = f"{' before' if task.before else ''} in {clock(task.seconds)}" if status in ("finished", "failed") else ""
    log = f"; its output: {os.path.relpath(task.folder.log)}" if status == "running" else ""
    print(f"{task.job.name}: {status}{took}{log}", flush=True)


def explain(tasks: Sequence[Task], lines: int = 12) -> str:
    """The reasons of failed tasks, and the ends of their logs."""
    parts = []
    for task in tasks:
        why = f"exit code {task.code}" if task.code else f"ended before {task.job.proof} was there"
        parts.append(f"{task.job.name}: {why}; {os.path.relpath(task.folder.log)} ends with:")
        parts += [f"    {line[:300]}" for line in task.folder.last_lines(lines)]
    return "\n".join(parts)
