"""Callbacks: progress, sample answers, export of the student, predictions."""

from opcd.callbacks.export import ExportStudent
from opcd.callbacks.predictions import PredictionWriter
from opcd.callbacks.progress import StepProgress
from opcd.callbacks.samples import AnswerSamples

__all__ = ["AnswerSamples", "ExportStudent", "PredictionWriter", "StepProgress"]
