"""Atomic writes that follow no links, and the rule for files that may be replaced or removed.

The rule: this program replaces or removes a file only if it wrote the file. `MANIFEST` in a folder names the files that
it wrote there. A folder that holds anything else is refused (`require_own`), before a training begins.
"""

import errno
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from opcd.runtime.errors import UserError

MANIFEST = ".opcd-written.json"
"""A file that names all files which this program wrote into its folder."""
SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}-being-written")
"""Names of `scratch_beside`."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""Errors of `fsync` on file systems that do not sync folders."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""The system's error number in a message of safetensors, which is written in Rust."""


class DiskError(UserError):
    """The system refuses to write a file."""


class DiskFull(DiskError):
    """There is no room for a file. Files that were saved before do not change."""


def require_writable(path: Path, key: str) -> None:
    """Check that a file or folder can be made, before the work that fills it.

    Raises:
        UserError: the system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = scratch_beside(path)
        create(scratch).close()
        scratch.unlink()
    except OSError as error:
        raise UserError(f"{key}: cannot write {whole(path)}: {error.strerror}") from error


def scratch_beside(path: Path) -> Path:
    """An unpredictable name in the same folder, for a file or folder that is not complete yet."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}-being-written")


def create(path: Path) -> IO[bytes]:
    """Open a new file for writing. OSError where the name is taken, also by a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def open_own(path: Path, flags: int) -> int:
    """Open a plain file, which is made if needed. Returns its descriptor.

    Raises:
        OSError: somebody planted a link, a hard link, a pipe or a device under this name.
    """
    planted = OSError(errno.ELOOP, "a link, a pipe or a device has its name", str(path))
    try:
        descriptor = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise planted if error.errno in (errno.ELOOP, errno.ENXIO) else error from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        raise planted
    return descriptor


def append_lines(path: Path, text: str, lasting: bool = False) -> None:
    """Append lines to a file, which is made if needed.

    Args:
        path: the file.
        text: complete lines.
        lasting: wait until the lines survive a crash of the machine.

    Raises:
        DiskError: the system refuses, or the name is that of a link.
    """
    with explained(path), os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as stream:
        stream.write(text.encode())
        if lasting:
            stream.flush()
            os.fsync(stream.fileno())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically: complete or not at all, also after a crash of the machine.

    Raises:
        DiskError: the system refuses.
    """
    data = content.encode() if isinstance(content, str) else content
    with atomic_write(path, len(data)) as scratch, create(scratch) as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def atomic_write(path: Path, needed: int | None = None) -> Iterator[Path]:
    """Give the block a scratch name for a file or folder, which becomes `path` when the block ends.

    Args:
        path: the final name. Nothing changes there if the block fails.
        needed: bytes that the block writes, if known.

    Raises:
        DiskError: the system refuses.
    """
    scratch = scratch_beside(path)
    with explained(path, needed), removed_on_failure(scratch):
        yield scratch
        put_in_place(scratch, path)


def put_in_place(scratch: Path, path: Path) -> None:
    """Rename a complete file or folder, and wait until the name survives a crash of the machine."""
    scratch.replace(path)
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


@contextmanager
def removed_on_failure(scratch: Path) -> Iterator[None]:
    """Remove the file or folder `scratch`, which this process makes in the block, if the block fails."""
    assert SCRATCH.fullmatch(scratch.name), scratch
    try:
        yield
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(scratch) if scratch.is_dir() and not scratch.is_symlink() else scratch.unlink(missing_ok=True)
        raise


@contextmanager
def explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the system while the block writes `path` into one message.

    Args:
        path: the file or folder.
        needed: its bytes, if known.

    Raises:
        DiskError: with the system's reason; on a full disk with the bytes needed and free.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if type(error).__name__ == "SafetensorError" and (found := OS_ERROR.search(str(error))):
            number = int(found[1])
        if number is None:
            raise
        if number in FULL:
            raise _full(path, needed) from error
        why = "a link, a pipe or a device has its name; remove it" if number == errno.ELOOP else os.strerror(number)
        raise DiskError(f"cannot write {whole(path)}: {why}") from error


def require_room(path: Path, needed: int) -> None:
    """Check that `needed` bytes fit on the disk of `path`, before they are written.

    Raises:
        DiskFull: with the bytes needed and free.
    """
    if _free_bytes(path) < needed:
        raise _full(path, needed)


def _full(path: Path, needed: int | None) -> DiskFull:
    takes = f"it takes {needed / 2**20:.1f} MiB, and " if needed else ""
    return DiskFull(f"no room for {whole(path)}: {takes}{_free_bytes(path) / 2**20:.1f} MiB are free; free some room")


def _free_bytes(path: Path) -> int:
    path = whole(path)
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(there).free


def whole(path: Path) -> Path:
    """The absolute path; the path itself if the working folder is gone."""
    try:
        return path.absolute()
    except OSError:
        return path


def _foreign(folder: Path, own: Collection[str]) -> Iterator[str]:
    """Names of the entries of a folder that this program did not write, by the manifest and `own` (`require_own`)."""
    known = _manifest(folder) | {*own}
    for name in _entries(folder):
        if not SCRATCH.fullmatch(Path(name).name) and name not in known and Path(name).parts[0] not in own:
            yield name


def require_own(folder: Path, key: str, own: Collection[str] = ()) -> None:
    """Check that a folder, whose content will be replaced, holds only files that this program wrote.

    Args:
        folder: the folder, which need not exist.
        key: the config key or option that names the folder.
        own: more files and folders (with all in them) of this program than the manifest names.

    Raises:
        UserError: names some of the other files.
    """
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{key}: {folder} is no folder; name a new one")
    with explained(folder):
        others = list(itertools.islice(_foreign(folder, own), 4))  # a home folder has millions
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"{key}: {folder} holds files that opcd did not write there ({names}), and they would be replaced; name a "
            "new or an empty folder"
        )


def claim_folder(folder: Path, names: list[str], key: str) -> None:
    """Make a folder for files of these names, and remove what a killed process left half-written there.

    Raises:
        UserError: the folder holds other files, or cannot be made.
    """
    require_own(folder, key)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    if not set(names) <= _manifest(folder):
        write_atomic(folder / MANIFEST, json.dumps({"written": sorted({*names, *_manifest(folder)} - {MANIFEST})}))


def clear_scratch(folder: Path) -> None:
    """Remove the half-written files of a killed process. No other process may write there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if SCRATCH.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, key: str) -> Iterator[Path]:
    """Give the block a new folder, which replaces `target` atomically when the block ends.

    Raises:
        UserError: `target` holds files that this program did not write; nothing changes.
        DiskError: the system refuses.
    """
    require_own(target, key)
    scratch, former = scratch_beside(target), scratch_beside(target)
    with explained(target), removed_on_failure(scratch):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        for name in _entries(scratch):
            _fsync(scratch / name)
        write_manifest(scratch)
        if target.is_dir():
            target.rename(former)
        try:
            scratch.rename(target)
        except OSError:
            if former.exists():
                former.rename(target)
            raise
        _fsync(target.parent)
        remove_own(former)


def remove_own(folder: Path, own: Collection[str] = ()) -> None:
    """Remove the files that this program wrote into a folder, and the folder if nothing else is in it."""
    if not folder.is_dir() or folder.is_symlink():
        return
    others = set(_foreign(folder, own))
    for path in [folder / name for name in _entries(folder) if name not in others]:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    for inner, _, _ in os.walk(folder, topdown=False):
        if str(Path(inner).relative_to(folder)) not in others:
            with suppress(OSError):  # what is not empty stays
                Path(inner).rmdir()


def write_manifest(folder: Path) -> None:
    """Write the manifest: all that is in the folder now was written by this program."""
    write_atomic(folder / MANIFEST, json.dumps({"written": sorted(_entries(folder))}))


def _manifest(folder: Path) -> set[str]:
    """The names in a folder's manifest, with the manifest's own; empty without a valid one."""
    try:
        with os.fdopen(os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            names = json.load(stream)["written"]
        return {MANIFEST, *(name for name in names if isinstance(name, str))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _entries(folder: Path) -> Iterator[str]:
    """Relative names of the files and empty folders below a folder. Links are not followed."""
    for inner, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(inner, name).is_symlink()]
        empty = not folders and not files and Path(inner) != folder
        yield from (str(Path(inner, name).relative_to(folder)) for name in ([""] if empty else [*files, *links]))


def _raise(error: OSError) -> None:
    if error.errno != errno.ENOENT:  # a folder that is not there is empty
        raise error
