"""Requeueing of a job that SLURM ends at its time limit."""

import os
import signal
import subprocess

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.runtime.interruption import Interrupted


def started_again() -> bool:
    """Whether this process belongs to a job that SLURM has requeued."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0


def requeue_signal(trainer: Trainer) -> signal.Signals:
    """The signal that SLURM sends before the time limit (`#SBATCH --signal=USR1@120`)."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return getattr(environment, "requeue_signal", None) or signal.SIGUSR1


def requeue(trainer: Trainer, exception: BaseException) -> None:
    """Requeue the job from its first process if SLURM's signal before the time limit ended the run.

    `SLURMEnvironment(auto_requeue=False)` among the trainer's plugins disables this.
    """
    if not isinstance(exception, Interrupted) or exception.number != requeue_signal(trainer):
        return
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if not (SLURMEnvironment.detect() and getattr(environment, "auto_requeue", True) and trainer.is_global_zero):
        return
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ["SLURM_JOB_ID"]
    name = job if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", name], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        rank_zero_warn(f"SLURM did not put the job {name} back into the queue: {error}")
    else:
        rank_zero_info(f"SLURM has put the job {name} back into the queue")
