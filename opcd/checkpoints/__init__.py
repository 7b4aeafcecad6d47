"""Checkpoints that cannot be lost: whole or not there, proven by a manifest, found again after a kill."""

from opcd.checkpoints.files import BrokenCheckpoint, read_checkpoint, verify, write_checkpoint
from opcd.checkpoints.io import SafeCheckpointIO
from opcd.checkpoints.last import check_checkpoint, check_config, newest_of_run, newest_whole
from opcd.disk import DiskFull

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
