"""`opcd doctor`: show the installed packages, devices and models, and what is missing.

`opcd doctor --plan` and the options of `opcd fit`: predict the memory of this run.
"""

import argparse
import os
import platform
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from opcd.config.parsing import Parser
from opcd.runtime.errors import UserError
from opcd.runtime.extras import install_hint, pip_install
from opcd.runtime.output import shown
from opcd.runtime.versions import installed_version

REQUIRED = ("lightning", "torch", "transformers", "torchmetrics", "jsonargparse", "datasets", "safetensors")
OPTIONAL = {
    "lm-eval": ("evaluation with lm-eval", "evaluation"),
    "math-verify": ("checking of mathematical answers", "evaluation"),
    "textarena": ("text games", "games"),
    "bitsandbytes": ("4-bit and 8-bit teachers", "bitsandbytes"),
    "vllm": ("rollouts with vLLM", "vllm"),
}


def main(args: list[str]) -> int:
    """Print one screen. Returns 0, or 1 if a run lacks a package or memory.

    Raises:
        UserError: a proxy in the environment is not valid; all but the line about the hub is printed.
    """
    if (words := make_parser().parse_args(args).plan) is not None:
        from opcd.cli.plan import main as plan  # has the imports of a run

        return plan(words)
    complete = True
    for ok, text in chain(_packages(), _devices(), _models()):
        complete = complete and ok is not False
        print(("  ok   " if ok else "MISSING " if ok is False else "  --   ") + shown(text, lines=False))
    return 0 if complete else 1


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd doctor", description=__doc__)
    what = "predict the memory of `opcd fit` with the options that follow, without loading weights; --plan --help: more"
    parser.add_argument("--plan", nargs=argparse.REMAINDER, help=what)
    return parser


def _packages() -> Iterator[tuple[bool | None, str]]:
    """Yield (present; None if optional and missing, line)."""
    yield True, f"Python {platform.python_version()} on {platform.platform()}"
    for name in REQUIRED:
        version = installed_version(name)
        yield version is not None, f"{name} {version}" if version else f"{name}: {pip_install(name)}"
    for name, (purpose, extra) in OPTIONAL.items():
        version = installed_version(name)
        text = f"{name} {version}" if version else f"{name} is not installed; for {purpose}: {install_hint(extra)}"
        yield (True if version else None), text


def _devices() -> Iterator[tuple[bool | None, str]]:
    import torch

    from opcd.accel.precision import has_bfloat16

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    kind = "with bfloat16 instructions" if has_bfloat16("cpu") else "without bfloat16 instructions: float32 is used"
    yield True, f"CPU: {os.cpu_count()} cores, {memory:.0f} GiB of memory, {kind}"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield True, f"GPU {index}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if not torch.cuda.is_available():
        yield None, f"no CUDA GPU that torch {torch.__version__} can use"
    yield True, f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free in this folder"


def _models() -> Iterator[tuple[bool | None, str]]:
    from huggingface_hub import constants

    from opcd.models import PACKAGED
    from opcd.models import gguf_folder as gguf
    from opcd.models.hub_access import hub_reachable

    try:
        gguf.packaged_file()
        yield True, f"packaged model {PACKAGED} (4-bit weights, unpacked to 16 bits)"
    except UserError as error:
        yield None, str(error)
    for folder in sorted((gguf.cache_folder() / "models").glob("*/config.json")):
        yield True, f"converted model {folder.parent}"
    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*")):
        yield True, f"hub model on this disk: {folder.name.removeprefix('models--').replace('--', '/')}"
    if hub_reachable():
        yield True, f"the hub {constants.ENDPOINT} can be found"
    else:
        yield None, f"the hub {constants.ENDPOINT} cannot be reached: use folders, .gguf files or {PACKAGED}"
