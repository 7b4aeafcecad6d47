"""Callbacks: progress, sample answers, evaluation with lm-eval, export of the student, predictions, exact resume."""

from opcd.callbacks.export import ExportStudent
from opcd.callbacks.lm_eval import LMEval
from opcd.callbacks.predictions import PredictionWriter
from opcd.callbacks.progress import StepProgress
from opcd.callbacks.resume import ExactResume
from opcd.callbacks.samples import AnswerSamples

__all__ = ["AnswerSamples", "ExactResume", "ExportStudent", "LMEval", "PredictionWriter", "StepProgress"]
