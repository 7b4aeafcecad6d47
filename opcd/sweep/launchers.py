"""Launchers that start a job's process on this machine, or on a cluster through `srun`."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from opcd.runtime.errors import UserError
from opcd.sweep.jobs import JobFolder


class Running:
    """The process of a job, the leader of a session of its own.

    Args:
        process: the process.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, process: subprocess.Popen[bytes], grace: float) -> None:
        self.process, self.grace = process, grace

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self.process.poll()

    def end(self) -> None:
        """Wait `grace` seconds for the end, then send SIGKILL."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.grace)
        self.send(signal.SIGKILL)
        self.process.wait()

    def send(self, kind: signal.Signals) -> None:
        """Send a signal to the process and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, kind)


class LocalLauncher:
    """A launcher of processes on this machine, each with its share of the cores or GPUs.

    Args:
        jobs: most processes that run at the same time.
        keep_open: a file descriptor that every process inherits: the lock of the sweep's folder.
    """

    grace = 5.0
    """Seconds that a job has to end after SIGTERM."""

    def __init__(self, jobs: int, keep_open: int) -> None:
        self.jobs, self.keep_open, self.gpus = jobs, keep_open, visible_gpus()

    def start(self, folder: JobFolder, slot: int) -> Running:
        """Start the job of a folder, whose log takes the output. `slot` numbers the jobs that run at the same time."""
        with folder.log.open("wb") as log:
            process = subprocess.Popen(
                self.command(folder),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | self.variables(slot),
                pass_fds=(self.keep_open,),
                start_new_session=True,
            )
        return Running(process, self.grace)

    def command(self, folder: JobFolder) -> list[str]:
        """The command line of a job."""
        return folder.job.command

    def variables(self, slot: int) -> dict[str, str]:
        """Environment variables: the job's devices, and the process with which it must end."""
        return {**shares(slot, self.jobs, self.gpus, os.cpu_count() or 1), "OPCD_ENDS_WITH": str(os.getpid())}


class SlurmLauncher(LocalLauncher):
    """A launcher of one `srun` for each job, which waits in SLURM's queue. The nodes must share the sweep's folder.

    A job is one task. With several GPUs Lightning starts the other ranks itself, on the same node.

    Args:
        options: options of srun, such as --time=4:00:00.
        keep_open: as in `LocalLauncher`.

    Raises:
        UserError: srun is not installed, or a word is no option.
    """

    grace = 60.0

    def __init__(self, options: Sequence[str], keep_open: int) -> None:
        if wrong := next((option for option in options if not option.startswith("-")), None):
            raise UserError(f"slurm: {wrong!r} is no option of srun; write it as --NAME=VALUE")
        if shutil.which("srun") is None:
            raise UserError("--launcher slurm needs srun, which is not on the PATH; start the sweep where SLURM is")
        self.options, self.keep_open = options, keep_open

    def command(self, folder: JobFolder) -> list[str]:
        """The job's command through srun, without SLURM_NTASKS: Lightning would wait for a task for each device."""
        name = f"--job-name={folder.path.name}"
        return ["srun", "--ntasks=1", name, *self.options, "env", "-u", "SLURM_NTASKS", *folder.job.command]

    def variables(self, slot: int) -> dict[str, str]:
        """No variables: SLURM assigns the devices, and the sweep's process is on another machine."""
        return {}


def shares(slot: int, jobs: int, gpus: list[str], cores: int) -> dict[str, str]:
    """Environment variables that give each job devices of its own.

    More jobs than GPUs share them in turn. Without a GPU the cores are divided, unless OMP_NUM_THREADS is set:
    processes that each use all cores wait for one another in busy loops.
    """
    if gpus:
        each = max(1, len(gpus) // jobs)
        first = slot * each % len(gpus)
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and torch.cuda.is_available():
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
