"""A checkpoint file and its manifest.

How a checkpoint is written: `.NAME.RANDOM-being-written` beside the target, flushed and fsynced; then the manifest,
which accepts the new file and, where one of the same name is there, that too; then the name. Whenever the process or
the machine dies, what has the name is whole, and the manifest says so. Nothing is removed before.
"""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import (
    DiskFull,
    create,
    explained,
    put_in_place,
    removed_on_failure,
    scratch_beside,
    write_atomic,
)

SPARE = 4 * 2**20
"""Bytes for what a checkpoint holds beside its tensors."""


class BrokenCheckpoint(UserError):
    """A file is not the checkpoint that was written."""


def manifest_of(path: Path) -> Path:
    """The manifest of a checkpoint: what its file may be (bytes, sha256), step and config, and a SHA-256 of its own."""
    return path.with_name(f"{path.name}.json")


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint of Lightning's so that it is whole or not there, also after a crash of the machine.

    Raises:
        DiskFull: before anything is written where that can be known.
        DiskError: the system refuses.
    """
    scratch = scratch_beside(path)
    with _explained(path), removed_on_failure(scratch):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(checkpoint, path)
        digest = _write(checkpoint, scratch)
        former = []
        with suppress(BrokenCheckpoint, FileNotFoundError):
            former = verify(path)["accepts"]
        step, config = checkpoint.get("global_step"), checkpoint.get("config")
        manifest = {"accepts": [digest, *former], "step": step, "config": config}
        whole = {"manifest": manifest, "sha256": _own_digest(manifest)}
        write_atomic(manifest_of(path), json.dumps(whole, indent=1))
        put_in_place(scratch, path)


def read_checkpoint(path: Path, verified: bool = False) -> dict[str, Any]:
    """A checkpoint, verified, on the CPU; no code from the file runs.

    Args:
        path: the file.
        verified: its manifest has been looked at.

    Raises:
        UserError: it does not exist, is broken, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"ckpt_path: no checkpoint {path.absolute()}")
    if not verified and manifest_of(path).exists():
        verify(path)
    elif not verified:
        rank_zero_warn(f"{path} has no manifest ({manifest_of(path).name}): that it is whole cannot be verified")
    try:
        # Mapped: the ranks of a machine read one copy of the file, and what each of them takes of it.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # an unpickler that runs no code fails in any way on what is no checkpoint
        raise BrokenCheckpoint(f"{path} is no checkpoint that can be loaded: {_why(path, error)}") from error
    if not isinstance(loaded, dict):
        raise BrokenCheckpoint(f"{path} is no checkpoint: it holds a {type(loaded).__name__}, not a dictionary")
    return loaded


def _why(path: Path, error: Exception) -> str:
    """What is wrong with a file that torch does not load."""
    if not path.stat().st_size:
        return "it is empty"
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream:
            cut = stream.read(2) == b"PK"
        return "it is cut or damaged" if cut else "it is not in the format of torch.save"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, which could run code, or it is damaged"
    return f"it is damaged ({next(iter(str(error).splitlines()), type(error).__name__)})"


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint that is whole; `accepts` is what it is then.

    Raises:
        BrokenCheckpoint: it is not, or has no manifest.
    """
    manifest = read_manifest(path)
    if not path.is_file():
        raise BrokenCheckpoint(f"{path} is no file")
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found = {"bytes": stream.tell(), "sha256": digest}
    except OSError as error:
        raise BrokenCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    if found not in manifest["accepts"]:
        written = manifest["accepts"][0]["bytes"]
        why = "its SHA-256 differs" if written == found["bytes"] else f"{found['bytes']} bytes, not {written}"
        raise BrokenCheckpoint(f"{path} is not what was written ({why})")
    return {**manifest, "accepts": [found]}


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, its manifest last."""
    path.unlink(missing_ok=True)
    manifest_of(path).unlink(missing_ok=True)


class _Hashing:
    """A stream that takes the SHA-256 of what is written through it, and keeps the error that torch would hide."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest, self.bytes = stream, hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, a buffer of bytes."""
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.bytes += size
        return size

    def flush(self) -> None:
        """For `torch.save`."""


def _write(checkpoint: dict[str, Any], scratch: Path) -> dict[str, Any]:
    with create(scratch) as stream:
        hashing = _Hashing(stream)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # it writes and flushes, no more
        if hashing.error is not None:
            raise hashing.error
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": hashing.bytes, "sha256": hashing.digest.hexdigest()}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Say what a full disk is, and that what was saved before is still there."""
    try:
        with explained(path):
            yield
    except DiskFull as error:
        cause = error.__cause__
        if not isinstance(cause, OSError):
            raise
        raise DiskFull(_no_room(path, f"{cause.strerror} while it was written")) from error


def _check_space(checkpoint: dict[str, Any], path: Path) -> None:
    needed, free = tensor_bytes(checkpoint) + SPARE, shutil.disk_usage(path.parent).free
    if free < needed:
        raise DiskFull(_no_room(path, f"it takes {needed / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free"))


def _no_room(path: Path, why: str) -> str:
    return (
        f"no room for the checkpoint {path}: {why}; earlier ones are untouched. Free some room or set "
        "trainer.default_root_dir to another disk, and go on with --ckpt_path last"
    )


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples; a storage that several share counts once."""
    storages: dict[int, int] = {}
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple):
            pending += item
    return sum(storages.values())


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, which need not be whole itself.

    Raises:
        BrokenCheckpoint: there is none, or it is not what was written.
    """
    try:
        whole = json.loads(manifest_of(path).read_bytes())
        manifest: dict[str, Any] = whole["manifest"]
        if whole["sha256"] != _own_digest(manifest):
            raise ValueError("its SHA-256 is not that of what was written")
        _check_manifest(manifest)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} has no manifest ({manifest_of(path).name})") from error
    except OSError as error:
        raise BrokenCheckpoint(f"{manifest_of(path)} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{manifest_of(path)} is broken: {error}") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Refuse a manifest of other types: it may be somebody else's. ValueError, KeyError or TypeError."""
    accepts, step, config = (manifest[name] for name in ("accepts", "step", "config"))
    plain = isinstance(accepts, list) and all(
        isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in accepts
    )
    if not plain or not accepts:
        raise ValueError("`accepts` is no list of files")
    if not isinstance(step, int | None) or not isinstance(config, dict | None):
        raise ValueError("`step` or `config` is of another type")


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
