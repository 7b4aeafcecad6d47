"""The environment of a run: the machine, the commit of the code, the versions of packages."""

import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path

from opcd.runtime.versions import installed_version

FILE = "environment.json"
"""The file in a run's folder."""


def command_line() -> str:
    """What this process was started as: `opcd` and its words, or a Python script and its own."""
    program = Path(sys.argv[0])
    named = (
        ["opcd"]
        if program.name == "opcd" or program.parts[-2:] == ("opcd", "__main__.py")
        else ["python", program.name]
    )
    return shlex.join([*named, *sys.argv[1:]])


def machine() -> dict[str, str]:
    """The processor, memory, GPUs, system, and the commit of the code."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "memory": f"{memory:.0f} GiB",
        "GPUs": ", ".join(gpus) or "none",
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "commit": _commit(),
    }


def versions(*packages: str) -> dict[str, str]:
    """The version of each package."""
    return {package: installed_version(package) or "not installed" for package in packages}


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit of this file's clone; an installed file is in none, or in a repository that ignores it."""
    try:
        _git("ls-files", "--error-unmatch", Path(__file__).name)
        return _git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
