"""The plugin that Lightning saves and loads checkpoints with."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.utilities.types import _PATH

from opcd.checkpoints.checkpoint_files import manifest_of, read_checkpoint, write_checkpoint
from opcd.runtime.errors import UserError


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
