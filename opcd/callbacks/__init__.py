"""Callbacks: progress, sample answers, evaluation with lm-eval, export of the student, predictions,
checkpoints, exact resume, signals."""

from typing import TYPE_CHECKING

from opcd.lazy import lazily

if TYPE_CHECKING:
    from opcd.callbacks.alarms import Alarms
    from opcd.callbacks.checkpoints import SaveCheckpoints
    from opcd.callbacks.environment import WriteEnvironment
    from opcd.callbacks.export import ExportStudent
    from opcd.callbacks.history import KeepHistory
    from opcd.callbacks.lm_eval import LMEval
    from opcd.callbacks.predictions import PredictionWriter
    from opcd.callbacks.progress import StepProgress
    from opcd.callbacks.resume import ExactResume
    from opcd.callbacks.samples import AnswerSamples
    from opcd.callbacks.signals import LeaveOnSignal

__all__ = [
    "Alarms",
    "AnswerSamples",
    "ExactResume",
    "ExportStudent",
    "KeepHistory",
    "LMEval",
    "LeaveOnSignal",
    "PredictionWriter",
    "SaveCheckpoints",
    "StepProgress",
    "WriteEnvironment",
]

__getattr__ = lazily(__name__)
