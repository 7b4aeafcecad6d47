"""Callbacks: progress, sample answers, evaluation with lm-eval, export of the student, predictions,
checkpoints, exact resume, signals."""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.callbacks.alarms import Alarms
    from opcd.callbacks.answer_samples import AnswerSamples, PredictionWriter
    from opcd.callbacks.defaults import default_callbacks
    from opcd.callbacks.exact_resume import ExactResume
    from opcd.callbacks.export_student import ExportStudent
    from opcd.callbacks.history import KeepHistory
    from opcd.callbacks.lm_eval import LMEval
    from opcd.callbacks.recovery_and_drift import RecoveryAndDrift
    from opcd.callbacks.save_checkpoints import SaveCheckpoints
    from opcd.callbacks.signals import LeaveOnSignal
    from opcd.callbacks.step_progress import StepProgress
    from opcd.callbacks.write_environment import WriteEnvironment

__all__ = [
    "Alarms",
    "AnswerSamples",
    "ExactResume",
    "ExportStudent",
    "KeepHistory",
    "LMEval",
    "LeaveOnSignal",
    "PredictionWriter",
    "RecoveryAndDrift",
    "SaveCheckpoints",
    "StepProgress",
    "WriteEnvironment",
    "default_callbacks",
]

__getattr__ = lazily(__name__)
