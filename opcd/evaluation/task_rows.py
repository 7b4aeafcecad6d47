"""The rows of an lm-eval task: what was asked and answered, and a score for each metric that has one a row."""

import math
from typing import Any

from opcd.evaluation.scores import Metric, Row
from opcd.evaluation.task_loading import TaskRows

Found = dict[str, Any]
"""What `lm_eval.evaluator.evaluate` returns."""
SCORES = "scores"
"""Key of a row's scores, until it is finished."""
NO_SCORES = "computed over all rows together: a row has no score of its own, and there is no interval"


def scored_rows(task: TaskRows, passes: list[Found]) -> tuple[list[Row], list[str]]:
    """A row for each question and pass, and the names of the metrics that every row has a score for.

    Args:
        task: the task.
        passes: results and samples of each pass over its rows.
    """
    rows = [row for number, found in enumerate(passes) for row in _of_pass(task, found, number)]
    rows.sort(key=lambda row: (row["index"], row["sample"]))
    names = dict.fromkeys([*task.metrics, *(name for row in rows for name in row[SCORES])])
    scored = [name for name in names if all(row[SCORES].get(name) is not None for row in rows)]
    shares = {name for name in scored if all(value in (0, 1) for row in rows for value in _flat(row[SCORES][name]))}
    return [_finished(row, scored, shares) for row in rows], scored


def without_scores(task: TaskRows, passes: list[Found], scored: list[str]) -> dict[str, Metric]:
    """The other metrics, as lm-eval computes them; of several passes their mean."""
    filters = _filters(task)
    metrics = {}
    for name in task.metrics:
        metric, _, chosen = name.partition(",")
        values = [found["results"][task.name].get(f"{metric},{chosen or filters[0]}") for found in passes]
        if name not in scored and all(isinstance(value, int | float) for value in values):
            metrics[name] = Metric(sum(values) / len(values), note=NO_SCORES)
    return metrics


def _of_pass(task: TaskRows, found: Found, number: int) -> list[Row]:
    """A row a question, with the scores of all filters."""
    rows: dict[int, Row] = {}
    several = len(_filters(task)) > 1
    together = set(task.metrics) - set(task.row_metrics)  # lm-eval averages what the YAML does not list
    for sample in found["samples"][task.name]:
        row = rows.setdefault(sample["doc_id"], _row(task, sample, number))
        for metric in sample["metrics"]:
            name = f"{metric},{sample['filter']}" if several else metric
            row[SCORES][name] = None if name in together else _plain(sample[metric])
    return list(rows.values())


def _filters(task: TaskRows) -> list[str]:
    return [one["name"] for one in task.task.config.filter_list or [{"name": "none"}]]


def _row(task: TaskRows, sample: dict[str, Any], number: int) -> Row:
    doc, answers = sample["doc"], [resps[0] for resps in sample["resps"]]
    row = {"index": sample["doc_id"], "sample": number, "query": _query(task.task, doc)}
    if task.generates:
        answer = answers[0]
        said = {"response": str(answer), "reference": sample["target"]}
        return {**row, **said, SCORES: {}, "tokens": answer.tokens, "cut_off": answer.cut_off}
    return {**row, **_choices(task.task, doc, sample["target"], answers), SCORES: {}}


def _query(task: Any, doc: dict[str, Any]) -> str:
    """The question; where each choice makes a question of its own, all of them."""
    text = task.doc_to_text(doc)
    return text if isinstance(text, str) else " | ".join(map(str, task.doc_to_choice(doc)))


def _choices(task: Any, doc: dict[str, Any], target: Any, answers: list[Any]) -> Row:
    """The likeliest choice, the right one, and the log-likelihoods of all; of a single text its log-likelihood, and the
    text itself as the response where greedy decoding would write it."""
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"response": "", "reference": target, "log_likelihoods": answers}
    values = [value for value, _ in answers]
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"response": target if answers[0][1] else "", "reference": target, "log_likelihoods": values}
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    values = values[: len(choices)]  # behind them are those without the question
    if task.multiple_input:
        target = task.doc_to_text(doc)
    right = [_choice(choices, one) for one in (target if isinstance(target, list) else [target])]
    return {
        "response": choices[values.index(max(values))],
        "reference": right if isinstance(target, list) else right[0],
        "choices": choices,
        "log_likelihoods": values,
    }


def _choice(choices: list[str], target: Any) -> Any:
    return choices[target] if isinstance(target, int) and target < len(choices) else target


def _plain(score: Any) -> Any:
    """A score as Python's own bool or number, or a list of them; None for what is none."""
    if isinstance(score, list):
        values = [_plain(value) for value in score]
        return values if values and None not in values else None
    value = score.item() if hasattr(score, "item") else score  # numpy's
    if isinstance(value, bool) or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    return None


def _flat(score: Any) -> list[Any]:
    return score if isinstance(score, list) else [score]


def _finished(row: Row, scored: list[str], shares: set[str]) -> Row:
    """The row with its scores behind the reference; those of a share are true or false."""
    finished: Row = {}
    for key, value in row.items():
        if key != SCORES:
            finished[key] = value
            continue
        for name in scored:
            score = value[name]
            if name in shares:
                score = [bool(one) for one in score] if isinstance(score, list) else bool(score)
            finished[name] = score
    return finished
