"""The fastest floating-point type of a device: bfloat16 if it has the instructions, else float32."""

import os
from functools import cache
from typing import Literal

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

TrainerPrecision = Literal["bf16-mixed", "32-true"]

WITHOUT = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
"""Values of ONEDNN_MAX_CPU_ISA with which oneDNN does not use bfloat16 instructions."""


def has_bfloat16(device: torch.device | str = "cpu") -> bool:
    """Whether the device has instructions for bfloat16 products instead of emulating them.

    A CPU needs AVX512-BF16, AMX or ARM's equivalent, an NVIDIA GPU compute capability 8.0. The environment variable
    ONEDNN_MAX_CPU_ISA hides those of a CPU (for example AVX2), as it does from oneDNN.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _limit() not in WITHOUT and any("bf16" in name for name in _cpu_capabilities())
    if device.type == "mps":
        return _mps_multiplies()
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    supported = getattr(torch.get_device_module(device), "is_bf16_supported", None)
    return bool(supported and supported())


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """The default type of weights that are frozen or that generate: bfloat16 or float32."""
    return torch.bfloat16 if has_bfloat16(device) else torch.float32


def trainer_precision(accelerator: str = "auto") -> TrainerPrecision:
    """The default `precision` of a Lightning Trainer on this machine.

    Args:
        accelerator: the Trainer's; auto takes a GPU if there is one.
    """
    return "bf16-mixed" if has_bfloat16(device_of(accelerator)) else "32-true"


def chosen_precision(accelerator: str) -> TrainerPrecision:
    """`trainer_precision`, logged in one line."""
    device = device_of(accelerator)
    rank_zero_info(f"computing in {str(fast_dtype(device))[6:]}: {reason(device)}")
    return trainer_precision(accelerator)


def device_of(accelerator: str) -> torch.device:
    """The device that Lightning uses for an accelerator's name; an unknown one counts as a CPU."""
    if accelerator in ("auto", "gpu") and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return torch.device(accelerator if available.get(accelerator) else "cpu")


def reason(device: torch.device | str = "cpu") -> str:
    """The reason for `fast_dtype`, in a few words."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"this {device.type.upper()}"
    return f"{name} has {'' if has_bfloat16(device) else 'no '}bfloat16 instructions"


def warn_if_emulated(key: str, dtype: torch.dtype, device: torch.device | str) -> None:
    """Warn once per process if the device has no instructions for the type that `key` sets."""
    device = torch.device(device)
    slow = dtype == torch.bfloat16 and not has_bfloat16(device)
    slow = slow or (dtype == torch.float16 and device.type == "cpu" and not _cpu_has_float16())
    if slow:
        _warn(key, str(dtype)[6:], device.type.upper())


@cache
def _warn(key: str, dtype: str, device: str) -> None:
    rank_zero_warn(
        f"{key}: {dtype} is emulated on this {device}, which has no instructions for it: a step takes about ten times "
        "as long as in float32; remove the key: the type is then chosen for the hardware"
    )


def _limit() -> str:
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()


@cache
def _cpu_capabilities() -> tuple[str, ...]:
    """torch's names of this CPU's instruction sets: avx512_bf16, amx_bf16, ..."""
    if hasattr(torch.cpu, "get_capabilities"):
        return tuple(name for name, there in torch.cpu.get_capabilities().items() if there is True)
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}  # torch < 2.11
    return tuple(name for name, ask in asked.items() if getattr(torch.cpu, ask, bool)())


def _cpu_has_float16() -> bool:
    return _limit() not in WITHOUT and any(name in ("avx512_fp16", "amx_fp16") for name in _cpu_capabilities())


@cache
def _mps_multiplies() -> bool:
    """Whether a bfloat16 product works on MPS: in older releases of macOS torch raises."""
    try:
        square = torch.ones(2, 2, dtype=torch.bfloat16, device="mps")
        return bool((square @ square).float().sum().item() == 8)
    except (RuntimeError, TypeError):
        return False
