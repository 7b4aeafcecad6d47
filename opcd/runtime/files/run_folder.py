"""The folder of a run: version_N under trainer.default_root_dir, locked by its run."""

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import SCRATCH, open_own, whole
from opcd.runtime.files.locks import lock, owner_in_words, sign, take

METRICS, FORMER_METRICS = "metrics.csv", "metrics_before.csv"
"""The metrics of a run, and those of the runs that it resumed."""
FROM = "resumed_from.json"
"""The run that this one resumes, and its step."""


class RunFolder:
    """A folder that this process has made and locked. The lock ends with the process.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path, self._descriptor = path, descriptor

    @classmethod
    def claim(cls, root: Path) -> "RunFolder":
        """Make the next free folder version_N under `root` by mkdir, so that two runs never share one.

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
        """Unlock the folder and remove the lock file."""
        with suppress(OSError):  # the disk may be gone: another message says so
            _lock_of(self.path).unlink(missing_ok=True)
        os.close(self._descriptor)


@contextmanager
def one_at_a_time(root: Path) -> Iterator[None]:
    """Let one process at a time look for a run to resume under `root`, and claim a folder there."""
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
    """Check that all runs under `root` have ended, and remove half-written files of those that were killed.

    Raises:
        UserError: names the run that has not ended, or a lock file that somebody planted.
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
            if not take(descriptor, file):
                raise UserError(
                    f"ckpt_path: last: the run in {run} has not ended ({owner_in_words(descriptor)}); wait for it or "
                    "end it, or choose another trainer.default_root_dir"
                )
            left = run.glob("checkpoints/.*-being-written")
            for path in (*(path for path in left if SCRATCH.fullmatch(path.name)), file):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _locked(path: Path) -> int | None:
    """Lock a new folder. Returns the descriptor of its lock file, or None, without the folder, where a living run has
    the lock: somebody removed its folder."""
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
    """The run that the one in this folder resumed; None if it resumed none, or that one is gone."""
    try:
        path = folder / json.loads((folder / FROM).read_text(encoding="utf-8"))["run"]
        return path.resolve() if path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _lock_of(path: Path) -> Path:
    """The lock file. It lies beside the folder, which loggers want to find empty."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and Path(error.filename) != root else ""
        raise UserError(f"trainer.default_root_dir: cannot write to {whole(root)}: {error.strerror}{where}") from error
