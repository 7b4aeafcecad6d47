"""A step of `opcd fit` on the simulated GPU: rollout, teacher, loss, backward pass and optimizer, with device checks.

python -m tests.helpers.simulated.gpu_step    # from stdin by name: words of `opcd fit`; prints one JSON object
"""

import contextlib
import io
import json
import sys
import traceback
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

import opcd.cli.fit
from opcd.cli.main import main
from tests.helpers.simulated.gpu_device import DEVICE, NAME, counted


class Seen(Callback):
    """Keeps what a run has left when it ends.

    Attributes:
        found: the steps, the metrics, and on which devices the student's weights and the optimizer's states are.
    """

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read them, before Lightning moves the weights back."""
        states = [x for state in trainer.optimizers[0].state.values() for x in state.values() if x.dim() > 0]
        weights = [*pl_module.student.parameters(), *states]
        self.found = {
            "steps": trainer.global_step,
            "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
            "devices": sorted({str(tensor.device) for tensor in weights}),
            "states": len(states),
        }


def on_device(self: SingleDeviceStrategy) -> torch.device:
    """The trainer's device."""
    return DEVICE


def in_autocast(self: MixedPrecision) -> AbstractContextManager[None]:
    """The trainer's autocast."""
    return torch.autocast(NAME, torch.bfloat16)


def run(words: list[str]) -> dict[str, Any]:
    """What `opcd fit` did on the device."""
    said, seen = io.StringIO(), Seen()
    opcd.cli.fit.default_callbacks = lambda *yours, **options: [*yours, seen]
    with counted() as counts, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(["fit", *words])
        except Exception:  # of this recipe: the others run
            code = 1
            traceback.print_exc()
    return {"code": code, "syncs": counts.syncs, "said": said.getvalue()[-3000:]} | seen.found


if __name__ == "__main__":
    CPUAccelerator.setup_device = lambda self, device: None  # type: ignore[method-assign]
    SingleDeviceStrategy.root_device = property(on_device)  # type: ignore[assignment]
    MixedPrecision.autocast_context_manager = in_autocast  # type: ignore[method-assign]
    print(json.dumps({name: run(words) for name, words in json.loads(sys.stdin.read()).items()}))
