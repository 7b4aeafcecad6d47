"""Runs jobs beside and after one another, and goes on where a former run of the same folder stopped."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from opcd.results.run_files import clock
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import explained, open_own, require_own
from opcd.runtime.files.locks import lock, owner_of, seems_alive, sign, told
from opcd.sweep.jobs import Job, JobFolder
from opcd.sweep.launchers import LocalLauncher, Running

Status = Literal["waiting", "running", "finished", "failed", "not run"]
POLL_SECONDS = 0.5
LOCK = ".lock"
"""Of a folder of jobs: it is held while one of them runs, and says whose it is."""


@dataclass
class Task:
    """A job on its way."""

    job: Job
    folder: JobFolder
    status: Status = "waiting"
    begun: float = 0.0
    seconds: float = 0.0
    """How long it ran; of a former run where `before`."""
    before: bool = False
    """Whether a former run of the sweep had finished it."""
    code: int | None = None
    """Exit code of a failed one."""
    slot: int = 0
    running: Running | None = None


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """The folder for this process and those it starts; gives the file descriptor that holds the lock.

    The lock is gone when the last of them is, so a sweep that was killed cannot be started again over a run that it
    left behind. The lock file also tells that the folder is one of this program's.

    Raises:
        UserError: the folder cannot be made, holds other files, or somebody has the lock.
    """
    file = folder / LOCK
    if not file.exists():
        require_own(folder, "--out")
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_own(file, os.O_RDWR)
    try:
        owner = owner_of(descriptor)
        if not _taken(descriptor, file, owner):
            raise UserError(
                f"--out: {folder} is in use: by another sweep or experience run, or by what a killed one has left "
                f"behind ({told(owner)}); wait for it or end it, or choose another --out"
            )
        sign(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _taken(descriptor: int, file: Path, owner: dict[str, Any]) -> bool:
    """Whether this process has the folder now."""
    try:
        return lock(descriptor, file, wait=False) or not seems_alive(owner)
    except BlockingIOError:
        return False


class Engine:
    """Runs jobs, a folder each.

    Args:
        root: the folder of all jobs' folders.
        launcher: where the processes run.
        jobs: most that run at the same time.
    """

    def __init__(self, root: Path, launcher: LocalLauncher, jobs: int) -> None:
        self.root, self.launcher, self.jobs = root, launcher, jobs
        self.on_finish: Callable[[], None] = lambda: None
        """Called after each job that has finished."""
        self.tasks: dict[str, Task] = {}

    def add(self, jobs: Sequence[Job]) -> list[Task]:
        """Take jobs in; those that have finished before are not run again.

        Raises:
            UserError: one has finished with another config.
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
        """Run what waits until nothing can run any more. Whatever ends this early ends the processes too."""
        with sigterm_as_interrupt():
            try:
                while self._step():
                    time.sleep(POLL_SECONDS)
            finally:
                left = [task.running for task in self._with("running") if task.running is not None]
                for running in left:
                    running.ask_to_end()
                for running in left:
                    running.end()

    def failed(self) -> list[Task]:
        """Tasks that failed."""
        return self._with("failed")

    def _step(self) -> bool:
        """Collect what has ended, start what can start; whether there is more to do."""
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
    """Change the status of a task, and print a line about it."""
    task.status = status
    took = f"{' before' if task.before else ''} in {clock(task.seconds)}" if status in ("finished", "failed") else ""
    log = f"; its output: {os.path.relpath(task.folder.log)}" if status == "running" else ""
    print(f"{task.job.name}: {status}{took}{log}", flush=True)


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends the block as Ctrl-C does, so that what it started is ended with it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        """What Ctrl-C raises."""
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def explain(tasks: Sequence[Task], lines: int = 12) -> str:
    """What failed, and the end of each log."""
    parts = []
    for task in tasks:
        why = f"exit code {task.code}" if task.code else f"ended before {task.job.proof} was there"
        parts.append(f"{task.job.name}: {why}; {os.path.relpath(task.folder.log)} ends with:")
        parts += [f"    {line[:300]}" for line in task.folder.last_lines(lines)]
    return "\n".join(parts)
