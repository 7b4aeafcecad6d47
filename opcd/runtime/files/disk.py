"""Files that this program writes: whole or not there, never through a link; and what it may replace or remove.

The rule for folders: a file is replaced or removed only if this program wrote it. `MANIFEST` in a folder names the
files that were written there; a folder that holds anything else is refused (`require_own`), before a training begins.
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
"""Of a folder of this program's: the names of the files that it wrote there."""
SCRATCH = re.compile(r"\..+\.[0-9a-f]{16}-being-written")
"""Names of `scratch_beside`."""
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_FSYNC = (errno.EINVAL, errno.ENOTSUP)
"""What `fsync` of a folder says on file systems that have none."""
OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, which is Rust, tells the system's error number."""


class DiskError(UserError):
    """The system does not let a file be written."""


class DiskFull(DiskError):
    """There is no room for a file. What was saved before is untouched."""


def require_writable(path: Path, key: str) -> None:
    """See that a file or folder can be made, before the work that it is for.

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
    """A name in the same folder that nobody can know before, for what is not whole yet."""
    return path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}-being-written")


def create(path: Path) -> IO[bytes]:
    """A new file, to write. OSError where the name is taken, be it by a link."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "wb")


def open_own(path: Path, flags: int) -> int:
    """The descriptor of a plain file that is made where it is not there.

    Raises:
        OSError: the name is that of a link, a second name of another file, a pipe or a device: somebody planted it.
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
    """Add lines to a file, which is made where it is not there.

    Args:
        path: the file.
        text: whole lines.
        lasting: wait until they survive a crash of the machine.

    Raises:
        DiskError: the system refuses, or the name is that of a link.
    """
    with explained(path), os.fdopen(open_own(path, os.O_WRONLY | os.O_APPEND), "ab") as stream:
        stream.write(text.encode())
        if lasting:
            stream.flush()
            os.fsync(stream.fileno())


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is whole or not there, also after a crash of the machine.

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
    """A scratch name for what the block writes, a file or a folder; it becomes `path` when the block ends.

    Args:
        path: the name at the end. Left as it is where the block fails.
        needed: bytes that the block writes, where that is known.

    Raises:
        DiskError: the system refuses.
    """
    scratch = scratch_beside(path)
    with explained(path, needed), removed_on_failure(scratch):
        yield scratch
        put_in_place(scratch, path)


def put_in_place(scratch: Path, path: Path) -> None:
    """Give what is whole its name, so that it survives a crash of the machine."""
    scratch.replace(path)
    fsync_folder(path.parent)


def fsync_folder(folder: Path) -> None:
    """Let the names in a folder survive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


@contextmanager
def removed_on_failure(scratch: Path) -> Iterator[None]:
    """Leave nothing half-written behind. `scratch` is what this process makes in the block: a file or a folder."""
    try:
        yield
    except BaseException:
        discard(scratch)
        raise


def discard(scratch: Path) -> None:
    """Remove what this process has made under a name of `scratch_beside`."""
    assert SCRATCH.fullmatch(scratch.name), scratch
    with suppress(OSError):
        shutil.rmtree(scratch) if scratch.is_dir() and not scratch.is_symlink() else scratch.unlink(missing_ok=True)


@contextmanager
def explained(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turn the system's refusal to write `path` into one message.

    Args:
        path: what is written.
        needed: bytes that it takes, where that is known.

    Raises:
        DiskError: with the system's words, and what is needed and free where the disk is full.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _told_by_rust(error)
        if number is None:
            raise
        if number in FULL:
            raise DiskFull(f"no room for {whole(path)}: {room(path, needed)}; free some room") from error
        why = "a link, a pipe or a device has its name; remove it" if number == errno.ELOOP else os.strerror(number)
        raise DiskError(f"cannot write {whole(path)}: {why}") from error


def require_room(path: Path, needed: int) -> None:
    """Refuse what does not fit on the disk of `path`, before it is written.

    Raises:
        DiskFull: with the bytes needed and free.
    """
    if free_bytes(path) < needed:
        raise DiskFull(f"no room for {whole(path)}: {room(path, needed)}; free some room")


def room(path: Path, needed: int | None = None) -> str:
    """How much is needed and free, in words."""
    words = [f"it takes {needed / 2**20:.1f} MiB"] if needed else []
    return ", and ".join([*words, f"{free_bytes(path) / 2**20:.1f} MiB are free"])


def free_bytes(path: Path) -> int:
    """Bytes that are free where `path` is, or will be."""
    path = whole(path)
    there = next((folder for folder in (path, *path.parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(there).free


def whole(path: Path) -> Path:
    """The path from the root; as it is where the working folder is gone."""
    try:
        return path.absolute()
    except OSError:
        return path


def foreign(folder: Path, own: Collection[str] = ()) -> Iterator[str]:
    """Names of what is in a folder and was not written there by this program.

    Args:
        folder: a folder with a manifest.
        own: files of this program's beside those that the manifest names, and folders with all that is in them.
    """
    known = _manifest(folder) | {*own}
    for name in _entries(folder):
        if not SCRATCH.fullmatch(Path(name).name) and name not in known and Path(name).parts[0] not in own:
            yield name


def require_own(folder: Path, key: str, own: Collection[str] = ()) -> None:
    """Refuse a folder that holds what this program did not write (`foreign`). What is in it would be replaced.

    Raises:
        UserError: names some of the files.
    """
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UserError(f"{key}: {folder} is no folder; name a new one")
    with explained(folder):
        others = list(itertools.islice(foreign(folder, own), 4))  # a home folder has millions
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise UserError(
            f"{key}: {folder} holds files that opcd did not write there ({names}), and they would be replaced; name a "
            "new or an empty folder"
        )


def claim_folder(folder: Path, names: list[str], key: str) -> None:
    """Take a folder for files of these names, and clear away what a killed process has half-written.

    Raises:
        UserError: it holds something else, or cannot be made.
    """
    require_own(folder, key)
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    clear_scratch(folder)
    if not set(names) <= _manifest(folder):
        write_atomic(folder / MANIFEST, json.dumps({"written": sorted({*names, *_manifest(folder)} - {MANIFEST})}))


def clear_scratch(folder: Path) -> None:
    """Remove the files that a killed process has half-written. Nobody else may be writing there."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if SCRATCH.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
            entry.unlink(missing_ok=True)


@contextmanager
def whole_folder(target: Path, key: str) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `target` when the block ends: whole or not there.

    Raises:
        UserError: `target` holds what this program did not write; it is as before.
        DiskError: the system refuses.
    """
    require_own(target, key)
    scratch, former = scratch_beside(target), scratch_beside(target)
    with explained(target), removed_on_failure(scratch):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch.mkdir()
        yield scratch
        for name in _entries(scratch):
            _fsync_file(scratch / name)
        write_manifest(scratch)
        if target.is_dir():
            target.rename(former)
        try:
            scratch.rename(target)
        except OSError:
            if former.exists():
                former.rename(target)
            raise
        fsync_folder(target.parent)
        remove_own(former)


def remove_own(folder: Path, own: Collection[str] = ()) -> None:
    """Remove what this program wrote into a folder, and then the folder. What else is in it stays (`foreign`)."""
    if not folder.is_dir() or folder.is_symlink():
        return
    others = set(foreign(folder, own))
    for path in [folder / name for name in _entries(folder) if name not in others]:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
    for inner, _, _ in os.walk(folder, topdown=False):
        if str(Path(inner).relative_to(folder)) not in others:
            with suppress(OSError):  # what is not empty stays
                Path(inner).rmdir()


def write_manifest(folder: Path) -> None:
    """Note all that is in a folder now as written by this program."""
    write_atomic(folder / MANIFEST, json.dumps({"written": sorted(_entries(folder))}))


def _manifest(folder: Path) -> set[str]:
    """The names that a folder's manifest holds, its own included; none where there is no manifest."""
    try:
        with os.fdopen(os.open(folder / MANIFEST, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            names = json.load(stream)["written"]
        return {MANIFEST, *(name for name in names if isinstance(name, str))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()


def _entries(folder: Path) -> Iterator[str]:
    """Names of the files and empty folders below a folder, relative to it. Links are not followed."""
    for inner, folders, files in os.walk(folder, onerror=_raise):
        links = [name for name in folders if Path(inner, name).is_symlink()]
        empty = not folders and not files and Path(inner) != folder
        yield from (str(Path(inner, name).relative_to(folder)) for name in ([""] if empty else [*files, *links]))


def _raise(error: OSError) -> None:
    if error.errno != errno.ENOENT:  # there is no such folder: nothing in it
        raise error


def _fsync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _told_by_rust(error: Exception) -> int | None:
    found = OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else None
