"""Faster computation on one kind of hardware. The method does not depend on it.

`accelerator(device)` is the only way in: the code of a device is imported where a model runs on such a device.
"""

from functools import cache

import torch

from opcd.accel.base import Accelerator

__all__ = ["Accelerator", "accelerator"]


@cache
def _of_type(kind: str) -> Accelerator:
    if kind == "cpu":
        from opcd.accel.cpu.accelerator import CPUAccelerator

        return CPUAccelerator()
    return Accelerator()


def accelerator(device: torch.device | str) -> Accelerator:
    """That of a device."""
    return _of_type(torch.device(device).type)
