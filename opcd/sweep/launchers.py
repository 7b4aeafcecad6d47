"""Where a job's process runs: on this machine, or on a cluster through `srun`."""

import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from opcd.runtime.errors import UserError
from opcd.sweep.jobs import JobFolder


class Running:
    """A job's process, the leader of a session of its own.

    Args:
        process: the process.
        grace: seconds between SIGTERM and SIGKILL.
    """

    def __init__(self, process: subprocess.Popen[bytes], grace: float) -> None:
        self.process, self.grace = process, grace

    def code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self.process.poll()

    def ask_to_end(self) -> None:
        """Send SIGTERM to the process and all that it started: Lightning first ends its step."""
        self._send(signal.SIGTERM)

    def end(self) -> None:
        """Wait for the end, and send SIGKILL to what is left after `grace` seconds."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(self.grace)
        self._send(signal.SIGKILL)
        self.process.wait()

    def _send(self, kind: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, kind)


class LocalLauncher:
    """Processes of this machine; each gets its share of the cores, or of the GPUs.

    Args:
        jobs: most that run at the same time.
        keep_open: a file descriptor that every process inherits: the lock of the sweep's folder.
    """

    grace = 5.0
    """Seconds that a job has to end after SIGTERM."""

    def __init__(self, jobs: int, keep_open: int) -> None:
        self.jobs, self.keep_open, self.gpus = jobs, keep_open, visible_gpus()

    def start(self, folder: JobFolder, slot: int) -> Running:
        """Start the job of a folder, its output to the folder's log. `slot` counts the jobs that run beside it."""
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
        """The job's devices, and the process that it ends with."""
        return {**shares(slot, self.jobs, self.gpus, os.cpu_count() or 1), "OPCD_ENDS_WITH": str(os.getpid())}


class SlurmLauncher(LocalLauncher):
    """One `srun` a job, which waits in SLURM's queue and then for the job. The nodes must share the sweep's folder.

    A job is one task; of several GPUs Lightning starts the other ranks itself, on the same node.

    Args:
        options: of srun, such as --time=4:00:00.
        keep_open: as in `LocalLauncher`.

    Raises:
        UserError: there is no srun, or an option is none.
    """

    grace = 60.0

    def __init__(self, options: Sequence[str], keep_open: int) -> None:
        if wrong := next((option for option in options if not option.startswith("-")), None):
            raise UserError(f"slurm: {wrong!r} is no option of srun; write it as --NAME=VALUE")
        if shutil.which("srun") is None:
            raise UserError("--launcher slurm needs srun, which is not on the PATH; start the sweep where SLURM is")
        self.options, self.keep_open = options, keep_open

    def command(self, folder: JobFolder) -> list[str]:
        """The job's command through srun; without SLURM_NTASKS, by which Lightning would wait for a task a device."""
        name = f"--job-name={folder.path.name}"
        return ["srun", "--ntasks=1", name, *self.options, "env", "-u", "SLURM_NTASKS", *folder.job.command]

    def variables(self, slot: int) -> dict[str, str]:
        """None: SLURM assigns the devices, and the process of the sweep is on another machine."""
        return {}


def shares(slot: int, jobs: int, gpus: list[str], cores: int) -> dict[str, str]:
    """Variables that keep a job off the devices of those beside it.

    More jobs than GPUs share them in turn. Without a GPU the cores are divided, where OMP_NUM_THREADS is not set:
    processes that use all cores each wait for one another in busy loops.
    """
    if gpus:
        each = max(1, len(gpus) // jobs)
        first = slot * each % len(gpus)
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[first : first + each])}
    if jobs == 1 or "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, cores // jobs))}


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and torch.cuda.is_available():
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
