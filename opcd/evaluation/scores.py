"""Metrics with intervals, from the scores of single answers."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opcd.evaluation.intervals import bootstrap, pass_at_k, wilson
from opcd.runtime.errors import UserError

Row = dict[str, Any]
"""A question and one answer: index, sample, query, response, reference, a score for each metric, tokens.

If log-likelihoods are compared: choices and log_likelihoods instead of tokens."""


@dataclass(frozen=True)
class Metric:
    """A share or a mean, with the bounds of its 95 % interval, or a note about why there is no interval."""

    value: float
    low: float | None = None
    high: float | None = None
    note: str | None = None


@dataclass(frozen=True)
class TaskResult:
    """The result of one task: number of questions, metrics by name, all answers, and the settings of the draw."""

    n: int
    metrics: dict[str, Metric]
    rows: list[Row]
    settings: dict[str, Any]


Results = dict[str, TaskResult]
"""The results by task name."""


def summarise(rows: Sequence[Row], names: Sequence[str]) -> dict[str, Metric]:
    """The metrics of a task's rows; the first of `names` is the main one.

    A row's score is a bool or a number, or a list of those that count one by one (IFEval's instructions). A share with
    one answer per question has Wilson's interval. All other metrics have that of the bootstrap over questions, because
    the answers to one question, and the instructions of one prompt, are not independent.
    """
    metrics = {name: _metric(_by_question(rows, name)) for name in names}
    if not names:
        return metrics
    main = _by_question(rows, names[0])
    samples = len(main[0])
    if samples > 1:
        metrics[f"avg@{samples}"] = metrics[names[0]]
        for k in sorted({2**power for power in range(samples.bit_length())} | {samples}):  # 1, 2, 4, ..., samples
            passed = [pass_at_k(sum(map(bool, scores)), samples, k) for scores in main]
            metrics[f"pass@{k}"] = Metric(sum(passed) / len(passed), *_bounds(passed, [1.0] * len(passed), (0.0, 1.0)))
    return metrics


def difference(rows: Sequence[Row], others: Sequence[Row], name: str) -> Metric:
    """The difference of a metric, `rows` minus `others`, with the interval of a paired bootstrap over questions.

    Raises:
        UserError: the two sides do not answer the same questions.
    """
    one, other = ({row["index"]: row["query"] for row in part} for part in (rows, others))
    if one != other:
        raise UserError("a difference needs answers to the same questions on both sides (same rows, same limit)")
    mine, theirs = _by_question(rows, name), _by_question(others, name)
    pairs = [(_values(a), _values(b)) for a, b in zip(mine, theirs, strict=True)]
    gaps = [sum(a) / len(a) - sum(b) / len(b) for a, b in pairs]
    weights = [len(a) for a, _ in pairs]  # a prompt with more instructions counts more, as in the metric itself
    sums = [gap * weight for gap, weight in zip(gaps, weights, strict=True)]
    span = (-1.0, 1.0) if _are_rates([*mine, *theirs]) else None
    return Metric(sum(sums) / sum(weights), *_bounds(sums, weights, span))


def _by_question(rows: Sequence[Row], name: str) -> list[list[Any]]:
    questions: defaultdict[int, list[Any]] = defaultdict(list)
    for row in rows:
        questions[row["index"]].append(row[name])
    return [questions[index] for index in sorted(questions)]


def _values(scores: list[Any]) -> list[Any]:
    """All scores of a question, lists flattened."""
    return [value for score in scores for value in (score if isinstance(score, list) else [score])]


def _are_rates(questions: list[list[Any]]) -> bool:
    """Whether all scores are bools or fractions from 0 to 1; an int is a count."""
    flat = [value for scores in questions for value in _values(scores)]
    return all(isinstance(value, bool) or (isinstance(value, float) and 0 <= value <= 1) for value in flat)


def _metric(questions: list[list[Any]]) -> Metric:
    """The metric of all questions, each with the scores of its answers."""
    values = [_values(scores) for scores in questions]
    sums, counts = [sum(part) for part in values], [len(part) for part in values]
    value = sum(sums) / sum(counts)
    if all(len(scores) == 1 and isinstance(scores[0], bool) for scores in questions):
        return Metric(value, *wilson(round(sum(sums)), len(sums)))
    return Metric(value, *_bounds(sums, counts, (0.0, 1.0) if _are_rates(questions) else None))


def _bounds(
    sums: Sequence[float], counts: Sequence[float], span: tuple[float, float] | None
) -> tuple[float | None, float | None]:
    return bootstrap(sums, counts, span) or (None, None)
