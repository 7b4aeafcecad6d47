"""The folder of a run."""

from pathlib import Path

from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> Path:
    """The folder that the first logger writes to, or else `trainer.default_root_dir`; the same on all ranks.

    A collective call: every rank must make it, which `Callback.setup` is the place for.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
    return folder
