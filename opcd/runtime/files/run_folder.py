"""The folder of a run: version_N under trainer.default_root_dir, one run in each, and who is at work in it."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import SCRATCH, open_own
from opcd.runtime.files.locks import lock, owner_of, seems_alive, sign, told

METRICS, FORMER_METRICS = "metrics.csv", "metrics_before.csv"
"""What a run has measured, and what those that it went on from had."""
FROM = "resumed_from.json"
"""The run that this one goes on from, and at which step."""


class RunFolder:
    """A folder that this process has made and locked. The lock goes with the process, however that ends.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def claim(cls, root: Path) -> "RunFolder":
        """Make the next free folder version_N under `root`: by mkdir, so that two runs never share one.

        Raises:
            UserError: nothing can be written there.
        """
        with _explained(root):
            root.mkdir(parents=True, exist_ok=True)
            for number in itertools.count():
                path = root / f"version_{number}"
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                if (descriptor := _locked(path)) is not None:
                    sign(descriptor)
                    return cls(path, descriptor)
        raise AssertionError  # numbers do not end

    def release(self) -> None:
        """Unlock the folder; nothing of the lock stays."""
        with suppress(OSError):  # the disk may be gone, and what is to be told is something else
            _lock_of(self.path).unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Nobody else claims a folder under `root` within the block, or looks what is there to go on from."""
    with _explained(root):
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with _explained(root):
            lock(descriptor, root / "version_N")
        yield
    finally:
        os.close(descriptor)


def refuse_living(root: Path) -> None:
    """Refuse to go on from runs of which one has not ended; clear away what dead ones have half-written.

    Raises:
        UserError: names the run that lives, or a lock file that somebody planted.
    """
    for file in sorted(root.glob(".version_*.lock")):
        run = root / file.name.removeprefix(".").removesuffix(".lock")
        try:
            descriptor = open_own(file, os.O_RDWR)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise UserError(f"ckpt_path: last: {file}: {error.strerror}; remove it") from error
        try:
            owner = owner_of(descriptor)
            if not _has_ended(descriptor, file):
                raise UserError(
                    f"ckpt_path: last: the run in {run} has not ended ({told(owner)}); wait for it or end it, or "
                    "choose another trainer.default_root_dir"
                )
            left = run.glob("checkpoints/.*-being-written")
            for path in (*(path for path in left if SCRATCH.fullmatch(path.name)), file):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _has_ended(descriptor: int, file: Path) -> bool:
    try:
        return lock(descriptor, file, wait=False) or not seems_alive(owner_of(descriptor))
    except BlockingIOError:
        return False


def _locked(path: Path) -> int | None:
    """The descriptor of the locked lock file of a new folder; without the folder, None where a run lives whose own
    folder of this name somebody has removed."""
    try:
        descriptor = open_own(_lock_of(path), os.O_RDWR)
        try:
            lock(descriptor, _lock_of(path), wait=False)
        except BaseException:
            os.close(descriptor)
            raise
    except OSError as error:
        path.rmdir()
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


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


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename) != root else ""
        raise UserError(
            f"trainer.default_root_dir: cannot write to {_resolved(root)}: {error.strerror}{where}"
        ) from error


def _resolved(root: Path) -> Path:
    try:
        return root.resolve()
    except OSError:
        return root
