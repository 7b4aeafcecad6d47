"""Checkpoint files and their manifests, written and read for Lightning by `SafeCheckpointIO`.

A checkpoint is written in three steps. The data go to `.NAME.RANDOM-being-written` beside the target, flushed and
fsynced. Then the manifest is written: it accepts the new file and, where a file has the name already, that file too.
Then the new file gets the name. Whenever the process or the machine dies, the file with the name is complete, and the
manifest accepts it.
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
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH
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
"""Bytes of a checkpoint beside its tensors."""


class BrokenCheckpoint(UserError):
    """An error about a file that is not the checkpoint that was written."""


class SafeCheckpointIO(CheckpointIO):
    """Saves files atomically, with a manifest; loads verified files, and no code.

    `Trainer(plugins=[SafeCheckpointIO()])` applies to every callback that saves; `opcd` always uses it. It supports
    local folders, and strategies that save one file (not the shards of FSDP or DeepSpeed).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write the file and its manifest; `DiskFull` where there is no room."""
        write_checkpoint(checkpoint, _local(path))

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load the file to the CPU, as tensors and plain values only; `UserError` where that fails."""
        if weights_only is False:
            raise UserError("weights_only=False would run code of the checkpoint; leave it out")
        return read_checkpoint(_local(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove the file, then its manifest."""
        for file in (_local(path), manifest_of(_local(path))):
            file.unlink(missing_ok=True)


def _local(path: _PATH) -> Path:
    if "://" in str(path):
        raise UserError(f"{path}: checkpoints are written to and read from local folders only")
    return Path(path)


def manifest_of(path: Path) -> Path:
    """The path of a checkpoint's manifest: accepted files (bytes, sha256), step, config, and a SHA-256 of its own."""
    return path.with_name(f"{path.name}.json")


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically, also with regard to a crash of the machine.

    Raises:
        DiskFull: there is no room; where the size is known, before anything is written.
        DiskError: the system does not let the file be written.
    """
    scratch = scratch_beside(path)
    with _explained(path), removed_on_failure(scratch):
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_space(checkpoint, path)
        digest = _write(checkpoint, scratch)
        former = []
        with suppress(BrokenCheckpoint, FileNotFoundError):
            former = verify(path)["accepts"]
        manifest = {
            "accepts": [digest, *former],
            "step": checkpoint.get("global_step"),
            "config": checkpoint.get("config"),
        }
        signed = {"manifest": manifest, "sha256": _own_digest(manifest)}
        write_atomic(manifest_of(path), json.dumps(signed, indent=1))
        put_in_place(scratch, path)


def read_checkpoint(path: Path, verified: bool = False) -> dict[str, Any]:
    """Read and verify a checkpoint, to the CPU; no code from the file runs.

    Args:
        path: the file.
        verified: the file has been compared with its manifest already.

    Raises:
        UserError: the file does not exist, is broken, or holds more than tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"ckpt_path: no checkpoint {path.absolute()}")
    if not verified and manifest_of(path).exists():
        verify(path)
    elif not verified:
        rank_zero_warn(f"{path} has no manifest ({manifest_of(path).name}) and cannot be verified")
    try:
        # Mapped: the ranks of a machine share one copy of the file in memory.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # the unpickler raises errors of any class for other files
        raise BrokenCheckpoint(f"{path} cannot be loaded as a checkpoint: {_why(path, error)}") from error
    if not isinstance(loaded, dict):
        raise BrokenCheckpoint(f"{path} is not a checkpoint: it holds a {type(loaded).__name__}, not a dictionary")
    return loaded


def _why(path: Path, error: Exception) -> str:
    """The reason why torch does not load a file."""
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
    """Compare a checkpoint with its manifest, and return the manifest, in which `accepts` holds this file only.

    Raises:
        BrokenCheckpoint: the file is not what was written, or has no manifest.
    """
    manifest = read_manifest(path)
    if not path.is_file():
        raise BrokenCheckpoint(f"{path} is not a file")
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


class _Hashing:
    """A stream that computes the SHA-256 of what is written, and keeps the error that torch would hide."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, a buffer of bytes."""
        if self.error is None:
            try:
                self.stream.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        """Do nothing: `torch.save` wants the method."""


def _write(checkpoint: dict[str, Any], scratch: Path) -> dict[str, Any]:
    with create(scratch) as stream:
        hashing = _Hashing(stream)
        torch.save(checkpoint, hashing)  # type: ignore[arg-type]  # it writes and flushes, no more
        if hashing.error is not None:
            raise hashing.error
        stream.flush()
        os.fsync(stream.fileno())
        return {"bytes": stream.tell(), "sha256": hashing.digest.hexdigest()}


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Add to the message of a full disk that earlier checkpoints are still there."""
    try:
        with explained(path):
            yield
    except DiskFull as error:
        if not isinstance(error.__cause__, OSError):  # of `_check_space`
            raise
        raise DiskFull(_no_room(path, f"{error.__cause__.strerror} while it was written")) from error


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
    """Bytes of all tensors in nested dicts, lists and tuples; a shared storage counts once."""
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
    """Read the manifest of a checkpoint, whose file is not looked at.

    Raises:
        BrokenCheckpoint: there is no manifest, or it is not what was written.
    """
    try:
        signed = json.loads(manifest_of(path).read_bytes())
        manifest: dict[str, Any] = signed["manifest"]
        if signed["sha256"] != _own_digest(manifest):
            raise ValueError("its SHA-256 differs")
        _check_manifest(manifest)
    except FileNotFoundError as error:
        raise BrokenCheckpoint(f"{path} has no manifest ({manifest_of(path).name})") from error
    except OSError as error:
        raise BrokenCheckpoint(f"{manifest_of(path)} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenCheckpoint(f"{manifest_of(path)} is broken: {error}") from error
    return manifest


def _check_manifest(manifest: Any) -> None:
    """Check the types in a manifest, which may be somebody else's: ValueError, KeyError or TypeError."""
    accepts = manifest["accepts"]
    files = accepts if isinstance(accepts, list) else []
    if not files or not all(isinstance(file, dict) and {"bytes", "sha256"} <= file.keys() for file in files):
        raise ValueError("`accepts` is not a list of files")
    if not isinstance(manifest["step"], int | None) or not isinstance(manifest["config"], dict | None):
        raise ValueError("`step` or `config` has another type")


def _own_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def saved_config(path: Path) -> dict[str, Any] | None:
    """Read the config in a checkpoint's manifest; None where there is none."""
    with suppress(BrokenCheckpoint):
        config: dict[str, Any] | None = read_manifest(path)["config"]
        return config
    return None
