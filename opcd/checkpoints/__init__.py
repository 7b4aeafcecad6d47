"""Crash-safe checkpoints: written atomically, verified by a manifest, found again after a kill."""

from opcd.checkpoints.checkpoint_checks import check_checkpoint, check_config
from opcd.checkpoints.checkpoint_files import (
    BrokenCheckpoint,
    SafeCheckpointIO,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from opcd.checkpoints.newest import newest_of_run, newest_whole
from opcd.runtime.files.disk import DiskFull

__all__ = [
    "BrokenCheckpoint",
    "DiskFull",
    "SafeCheckpointIO",
    "check_checkpoint",
    "check_config",
    "newest_of_run",
    "newest_whole",
    "read_checkpoint",
    "verify",
    "write_checkpoint",
]
