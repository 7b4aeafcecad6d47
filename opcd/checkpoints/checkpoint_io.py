"""What Lightning saves and loads checkpoints with."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from opcd.checkpoints.checkpoint_files import read_checkpoint, remove_checkpoint, write_checkpoint
from opcd.runtime.errors import UserError


class SafeCheckpointIO(CheckpointIO):
    """Saves files that are whole or not there, with a manifest; loads no code, and nothing that is broken.

    `Trainer(plugins=[SafeCheckpointIO()])` serves every callback that saves; `opcd` always has it. For folders of this
    machine's file systems, and strategies that save one file (not FSDP's or DeepSpeed's shards).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        """Write the file and its manifest (`DiskFull` where there is no room)."""
        write_checkpoint(checkpoint, _local(path))

    def load_checkpoint(
        self, path: _PATH, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Verify and load the file to the CPU, as tensors and plain values only (`UserError` where that fails)."""
        if weights_only is False:
            raise UserError("weights_only=False would run code out of the checkpoint; leave it out")
        return read_checkpoint(_local(path))

    def remove_checkpoint(self, path: _PATH) -> None:
        """Remove the file and its manifest."""
        remove_checkpoint(_local(path))


def _local(path: _PATH) -> Path:
    if "://" in str(path):
        raise UserError(f"{path}: checkpoints are written to and read from folders of this machine only")
    return Path(path)
