"""The folder of a run: version_N under trainer.default_root_dir, one run in each, and who is at work in it."""

import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from opcd.errors import UserError

METRICS, FORMER_METRICS = "metrics.csv", "metrics_before.csv"
"""What a run has measured, and what those that it went on from had."""
FROM = "resumed_from.json"
"""The run that this one goes on from, and at which step."""


class RunFolder:
    """A folder that this process has made and locked. The lock goes with the process, however that ends.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, stream: IO[str]) -> None:
        self.path, self._stream = path, stream

    @classmethod
    def claim(cls, root: Path) -> "RunFolder":
        """Make the next free folder version_N under `root`: by mkdir, so that two runs never share one.

        Raises:
            UserError: nothing can be written there.
        """
        with _explained(root):
            root.mkdir(parents=True, exist_ok=True)
            number = 0
            while True:
                try:
                    path = root / f"version_{number}"
                    path.mkdir()
                    break
                except FileExistsError:
                    number += 1
            stream = _lock_of(path).open("w")
            fcntl.flock(stream, fcntl.LOCK_EX)
            command = shlex.join(["opcd", *sys.argv[1:]])
            began = time.strftime("%Y-%m-%d %H:%M:%S %z")
            json.dump(
                {"process": os.getpid(), "host": socket.gethostname(), "began": began, "command": command}, stream
            )
            stream.flush()
        return cls(path, stream)

    def release(self) -> None:
        """Unlock the folder; nothing of the lock stays."""
        _lock_of(self.path).unlink(missing_ok=True)
        self._stream.close()


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Nobody else claims a folder under `root` within the block, or looks what is there to go on from."""
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refuse_living(root: Path) -> None:
    """Refuse to go on from runs of which one has not ended; clear away what dead ones have half-written.

    Raises:
        UserError: names the run that lives.
    """
    for lock in sorted(root.glob(".version_*.lock")):
        run = root / lock.name.removeprefix(".").removesuffix(".lock")
        with suppress(FileNotFoundError), lock.open("r+") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(
                    f"ckpt_path: last: the run in {run} has not ended ({_who(lock)}); wait for it or end it, or choose "
                    "another trainer.default_root_dir"
                ) from error
            for left in (*run.glob("checkpoints/.*-being-written"), lock):
                left.unlink(missing_ok=True)


def former_run(folder: Path) -> Path | None:
    """The run that the one in this folder went on from, where it still is; None where it began by itself."""
    try:
        path = folder / json.loads((folder / FROM).read_text(encoding="utf-8"))["run"]
        return path.resolve() if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _lock_of(path: Path) -> Path:
    """Beside the folder, which loggers want to find empty."""
    return path.with_name(f".{path.name}.lock")


def _who(lock: Path) -> str:
    try:
        who = json.loads(lock.read_text())
        return f"process {who['process']} on {who['host']} since {who['began']}: {who['command']}"
    except (OSError, ValueError, KeyError):
        return "its lock does not say whose it is"


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"trainer.default_root_dir: cannot write to {root.resolve()}: {error.strerror}") from error
