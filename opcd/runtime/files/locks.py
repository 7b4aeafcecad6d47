"""Locks between processes, which go with the process that holds them; and what is done on disks that have none."""

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
"""What `flock` says on file systems without it. EBADF: NFS does not lock what is open for reading, as folders are."""


def lock(descriptor: int, path: Path, wait: bool = True) -> bool:
    """Lock an open file; whether it is locked: on a disk without locks it is not, and a line says so.

    Raises:
        BlockingIOError: another process has it, and this one does not wait.
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
    """A block that one process at a time is in. The lock file stays.

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


def sign(descriptor: int) -> None:
    """Write into a lock file whose it is."""
    command = shlex.join(["opcd", *sys.argv[1:]])
    began = time.strftime("%Y-%m-%d %H:%M:%S %z")
    owner = {"process": os.getpid(), "host": socket.gethostname(), "began": began, "command": command}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def owner_of(descriptor: int) -> dict[str, Any]:
    """What `sign` has written; empty where the file does not say."""
    try:
        owner = json.loads(os.pread(descriptor, 2**16, 0))
    except (ValueError, RecursionError):
        return {}
    known = isinstance(owner, dict) and isinstance(owner.get("process"), int)
    return owner if known else {}


def told(owner: dict[str, Any]) -> str:
    """An owner in words."""
    if not owner:
        return "its lock does not say whose it is"
    parts = {name: owner.get(name, "?") for name in ("process", "host", "began", "command")}
    return "process {process} on {host} since {began}: {command}".format(**parts)


def seems_alive(owner: dict[str, Any]) -> bool:
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
        f"opcd: {folder} lies on a disk without file locks ({why}): nothing keeps two processes from writing there at "
        "the same time; see to it that there is one",
        file=sys.stderr,
    )
