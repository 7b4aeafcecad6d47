"""A record of the command, the machine and the package versions of a run."""

import json
import time

from lightning.pytorch import Callback, LightningModule, Trainer

from opcd.callbacks.log_folder import run_folder
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.output import masked
from opcd.runtime.system_info import FILE, command_line, machine, versions

PACKAGES = ("opcd", "torch", "transformers", "lightning", "peft", "bitsandbytes", "lm-eval", "math-verify")


class WriteEnvironment(Callback):
    """Writes `environment.json` in the run's folder: the command, its start time, and rank 0's machine and versions."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file."""
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            known = {
                "command": masked(command_line()),
                "began": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                "machine": machine(),
                "versions": versions(*PACKAGES),
            }
            write_atomic(folder / FILE, json.dumps(known, indent=2, ensure_ascii=False) + "\n")
