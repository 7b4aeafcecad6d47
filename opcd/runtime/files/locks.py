"""Locks between processes, which end with their process, and the fallback on disks without locks."""

import errno
import fcntl
import json
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from opcd.runtime.files.disk import explained, open_own

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF)
"""Errors of `flock` on file systems without locks. EBADF: NFS locks no file opened for reading, such as a folder."""


def lock(descriptor: int, path: Path, wait: bool = True) -> bool:
    """Lock an open file. Returns False, and prints a warning, on a disk without locks.

    Raises:
        BlockingIOError: another process has the lock, and `wait` is False.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _say_unprotected(path.parent, str(error.strerror))
        return False
    return True


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Let one process at a time run the block. The lock file stays.

    Raises:
        DiskError: the lock file cannot be made, or is a link.
    """
    with explained(path):
        descriptor = open_own(path, os.O_RDWR)
        try:
            lock(descriptor, path)
            yield
        finally:
            os.close(descriptor)


def take(descriptor: int, path: Path) -> bool:
    """Lock a file that `sign` writes to, without waiting. Returns False where its owner is alive."""
    try:
        return lock(descriptor, path, wait=False) or not _seems_alive(_owner_of(descriptor))
    except BlockingIOError:
        return False


def sign(descriptor: int) -> None:
    """Write this process into a lock file, as its owner."""
    command = shlex.join(["opcd", *sys.argv[1:]])
    began = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"process": os.getpid(), "host": socket.gethostname(), "began": began, "command": command}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def owner_in_words(descriptor: int) -> str:
    """The owner of a lock file, for messages."""
    if not (owner := _owner_of(descriptor)):
        return "its lock does not say whose it is"
    parts = {name: owner.get(name, "?") for name in ("process", "host", "began", "command")}
    return "process {process} on {host} since {began}: {command}".format(**parts)


def _owner_of(descriptor: int) -> dict[str, Any]:
    """The content that `sign` has written; empty if there is none."""
    try:
        owner = json.loads(os.pread(descriptor, 2**16, 0))
    except (ValueError, RecursionError):
        return {}
    known = isinstance(owner, dict) and isinstance(owner.get("process"), int)
    return owner if known else {}


def _seems_alive(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine has the owner's number. For disks without locks."""
    if not owner or owner.get("host") != socket.gethostname() or owner["process"] == os.getpid():
        return False
    try:
        os.kill(owner["process"], 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


@cache
def _say_unprotected(folder: Path, why: str) -> None:
    print(
        f"opcd: {folder} lies on a disk without file locks ({why}): two processes could write there at the same "
        "time; start only one",
        file=sys.stderr,
    )
