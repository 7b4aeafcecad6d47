"""Evaluation with lm-eval: of the student in training (`opcd.callbacks.LMEval`) and of any model (`opcd evaluate`).

lm-eval is imported only when an evaluation is set up: `opcd` works without it.
"""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.evaluation.evaluation_config import Evaluation
    from opcd.evaluation.evaluation_run import Evaluator
    from opcd.evaluation.scores import Metric, Results, TaskResult, difference

__all__ = ["Evaluation", "Evaluator", "Metric", "Results", "TaskResult", "difference"]

__getattr__ = lazily(__name__)
