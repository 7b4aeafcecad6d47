"""A step of `opcd fit` on the simulated GPU: rollout, teacher, loss, backward pass and optimizer, with device checks.

    python -m tests.helpers.simulated.gpu_step NAME WORDS...   # words of `opcd fit`; one JSON object
"""

import json
import sys
from contextlib import AbstractContextManager

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from opcd.cli.main import main
from tests.helpers.simulated.gpu_device import DEVICE, NAME, counted

PHASES = ("rollout", "teacher", "student", "loss", "optimizer")


def on_device(self: SingleDeviceStrategy) -> torch.device:
    """The trainer's device."""
    return DEVICE


def in_autocast(self: MixedPrecision) -> AbstractContextManager[None]:
    """The trainer's autocast."""
    return torch.autocast(NAME, torch.bfloat16)


def run(words: list[str]) -> dict[str, object]:
    """The exit code of `opcd fit`, and the kernels and syncs of the run."""
    with counted() as counts:
        code = main(["fit", *words])
    return {"code": code, "kernels": counts.kernels.total(), "syncs": counts.syncs.total(), "names": counts.syncs}


if __name__ == "__main__":
    CPUAccelerator.setup_device = lambda self, device: None  # type: ignore[method-assign]
    SingleDeviceStrategy.root_device = property(on_device)  # type: ignore[assignment]
    MixedPrecision.autocast_context_manager = in_autocast  # type: ignore[method-assign]
    print(json.dumps({name: run(words) for name, words in json.loads(sys.stdin.read()).items()}))
