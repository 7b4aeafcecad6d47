"""Crash-safe checkpoints: written atomically, verified by a manifest, found again after a kill."""

from opcd.checkpoints.checkpoint_files import BrokenCheckpoint, read_checkpoint, verify, write_checkpoint
from opcd.checkpoints.checkpoint_io import SafeCheckpointIO
from opcd.checkpoints.newest import check_checkpoint, check_config, newest_of_run, newest_whole
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
