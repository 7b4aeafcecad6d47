"""The callbacks that every run has."""

from lightning.pytorch import Callback

from opcd.callbacks.alarms import Alarms
from opcd.callbacks.answer_samples import AnswerSamples, PredictionWriter
from opcd.callbacks.exact_resume import ExactResume
from opcd.callbacks.export_student import ExportStudent
from opcd.callbacks.history import KeepHistory
from opcd.callbacks.recovery_and_drift import RecoveryAndDrift
from opcd.callbacks.save_checkpoints import SaveCheckpoints
from opcd.callbacks.step_progress import StepProgress
from opcd.callbacks.write_environment import WriteEnvironment


def default_callbacks(
    *yours: Callback, fit: bool = True, progress: bool = True, checkpoints: bool = True
) -> list[Callback]:
    """The callbacks that `opcd fit` adds to yours, for `Trainer(callbacks=default_callbacks())`.

    Progress, sample answers, recovery and drift, alarms, the student's folder, checkpoints that resume exactly, and
    the record of the environment. They write into the folder of the trainer's logger. (`LeaveOnSignal` is not among
    them: a signal ends the command with a checkpoint and an exit code, which a notebook has no use for.)

    Args:
        yours: come first. A callback of yours replaces the default one of its class.
        fit: whether the trainer trains; False leaves out what training alone needs.
        progress: False for a trainer with `enable_progress_bar=False`.
        checkpoints: False for a trainer with `enable_checkpointing=False`.
    """
    found: list[Callback] = [WriteEnvironment(), ExactResume(), ExportStudent(), PredictionWriter()]
    if progress:
        found.append(StepProgress())
    if checkpoints:
        found.append(SaveCheckpoints())
    if fit:
        found += [AnswerSamples(), RecoveryAndDrift(), Alarms(), KeepHistory()]
    return [*yours, *(callback for callback in found if not any(isinstance(own, type(callback)) for own in yours))]
