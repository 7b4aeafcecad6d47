"""Where a job's process runs: on this machine, or on a cluster through submitit."""

import json
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path
from typing import Any

from opcd.runtime.errors import UserError
from opcd.runtime.extras import require
from opcd.runtime.files.disk import write_atomic
from opcd.sweep.jobs import JobFolder

GRACE_SECONDS = 5


class Running(ABC):
    """A job that was started."""

    @abstractmethod
    def code(self) -> int | None:
        """Its exit code, or None while it runs."""

    @abstractmethod
    def stop(self) -> None:
        """End it, and every process that it started."""


class Launcher(ABC):
    """Starts jobs."""

    @abstractmethod
    def start(self, folder: JobFolder, slot: int) -> Running:
        """Start the job of a folder, its output to the folder's log. `slot` counts the jobs that run beside it."""

    def attach(self, folder: JobFolder) -> Running | None:
        """The job where a sweep that is gone has started it, and it still runs."""
        return None


class LocalProcess(Running):
    """A process of this machine, the leader of a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def code(self) -> int | None:
        """Negative for a signal."""
        return self.process.poll()

    def stop(self) -> None:
        """SIGTERM to the whole group, and SIGKILL to what is left after a while: Lightning first ends its step."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, kind)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE_SECONDS)


class LocalLauncher(Launcher):
    """Processes of this machine; each gets its share of the cores, or of the GPUs.

    Args:
        jobs: most that run at the same time.
        keep_open: a file descriptor that every process inherits: the lock of the sweep's folder.
    """

    def __init__(self, jobs: int, keep_open: int) -> None:
        self.jobs, self.keep_open, self.gpus = jobs, keep_open, visible_gpus()

    def start(self, folder: JobFolder, slot: int) -> Running:
        """Start a process."""
        environment = os.environ | shares(slot, self.jobs, self.gpus, os.cpu_count() or 1)
        environment["OPCD_ENDS_WITH"] = str(os.getpid())
        with folder.log.open("wb") as log:
            process = subprocess.Popen(
                folder.job.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=(self.keep_open,),
                start_new_session=True,
            )
        return LocalProcess(process)


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


class ClusterJob(Running):
    """A job of submitit's."""

    def __init__(self, job: Any) -> None:
        self.job = job

    def code(self) -> int | None:
        """1 for a job that the cluster ended."""
        import submitit

        if not self.job.done():
            return None
        try:
            return int(self.job.result())
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError):
            return 1

    def stop(self) -> None:
        """Cancel it."""
        self.job.cancel()


class SlurmLauncher(Launcher):
    """Jobs of a SLURM cluster. The folder must lie on a disk that the nodes share.

    Args:
        folder: for submitit's own files.
        parameters: of submitit's AutoExecutor. `cluster: local` or `debug` tries the path without a cluster.

    Raises:
        UserError: submitit or the cluster is not there, or a parameter is wrong.
    """

    def __init__(self, folder: Path, parameters: dict[str, Any]) -> None:
        require("slurm", "submitit", "--launcher slurm")
        import submitit

        parameters = dict(parameters)
        self.cluster = parameters.pop("cluster", "slurm")
        try:
            self.executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
            self.executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, AssertionError, TypeError) as error:
            raise UserError(f"--launcher slurm: {error}") from error

    def start(self, folder: JobFolder, slot: int) -> Running:
        """Submit, and write down the job's id."""
        self.executor.update_parameters(name=folder.path.name[:60])
        job = self.executor.submit(run_here, folder.job.command, str(Path.cwd()), str(folder.log.resolve()))
        write_atomic(folder.path / "submitted.json", json.dumps({"cluster": self.cluster, "job_id": job.job_id}))
        return ClusterJob(job)

    def attach(self, folder: JobFolder) -> Running | None:
        """The job that was submitted before, where the cluster still has it."""
        import submitit

        note = folder.path / "submitted.json"
        if self.cluster != "slurm" or not note.exists():
            return None
        job: Any = submitit.SlurmJob(self.executor.folder, json.loads(note.read_text(encoding="utf-8"))["job_id"])
        return None if job.done(force_check=True) else ClusterJob(job)


def run_here(command: list[str], folder: str, log: str) -> int:
    """What a node of the cluster runs."""
    with Path(log).open("wb") as stream:
        code = subprocess.run(command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    time.sleep(0.1)  # a shared disk shows the log before the result
    return code
