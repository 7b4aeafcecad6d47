"""The answered rows of an lm-eval task: question, answer, and one score for each metric that rows have a score for."""

import math
from typing import Any

from opcd.evaluation.scores import Metric, Row
from opcd.evaluation.task_loading import TaskRows

Found = dict[str, Any]
"""The return value of `lm_eval.evaluator.evaluate`."""
SCORES = "scores"
"""Key of a row's scores until the row is finished."""
NO_SCORES = "computed over all rows together: a row has no score of its own, and there is no interval"


def scored_rows(task: TaskRows, passes: list[Found]) -> tuple[list[Row], list[str]]:
    """One row per question and pass, and the names of the metrics that every row has a score for.

    Args:
        task: the task.
        passes: results and samples of each pass over the task's rows.
    """
    rows = [row for number, found in enumerate(passes) for row in _of_pass(task, found, number)]
    rows.sort(key=lambda row: (row["index"], row["sample"]))
    names = dict.fromkeys([*task.metrics, *(name for row in rows for name in row[SCORES])])
    scored = [name for name in names if all(row[SCORES].get(name) is not None for row in rows)]
    shares = {name for name in scored if all(value in (0, 1) for row in rows for value in _flat(row[SCORES][name]))}
    return [_finished(row, scored, shares) for row in rows], scored


def without_scores(task: TaskRows, passes: list[Found], scored: list[str]) -> dict[str, Metric]:
    """The other metrics, as lm-eval computes them; the mean over the passes."""
    metrics = {}
    for name in task.metrics:
        metric, _, chosen = name.partition(",")
        values = [found["results"][task.name].get(f"{metric},{chosen or task.filters[0]}") for found in passes]
        if name not in scored and all(isinstance(value, int | float) for value in values):
            metrics[name] = Metric(sum(values) / len(values), note=NO_SCORES)
    return metrics


def _of_pass(task: TaskRows, found: Found, number: int) -> list[Row]:
    """One row per question, with the scores of all filters."""
    rows: dict[int, Row] = {}
    together = set(task.metrics) - set(task.row_metrics)  # lm-eval also averages metrics that the YAML does not list
    for sample in found["samples"][task.name]:
        row = rows.setdefault(sample["doc_id"], _row(task, sample, number))
        for metric in sample["metrics"]:
            name = f"{metric},{sample['filter']}" if len(task.filters) > 1 else metric
            row[SCORES][name] = None if name in together else _plain(sample[metric])
    return list(rows.values())


def _row(task: TaskRows, sample: dict[str, Any], number: int) -> Row:
    doc, answers = sample["doc"], [resps[0] for resps in sample["resps"]]
    query = task.task.doc_to_text(doc)
    if not isinstance(query, str):  # each choice makes a question of its own
        query = " | ".join(map(str, task.task.doc_to_choice(doc)))
    row = {"index": sample["doc_id"], "sample": number, "query": query, SCORES: {}}
    if task.generates:
        row |= {"response": str(answers[0]), "reference": sample["target"]}
        return row | {"tokens": answers[0].tokens, "cut_off": answers[0].cut_off}
    return row | _choices(task.task, doc, sample["target"], answers)


def _choices(task: Any, doc: dict[str, Any], target: Any, answers: list[Any]) -> Row:
    """The likeliest choice, the right one, and the log-likelihoods of all choices.

    A single text has its log-likelihood, and the text as the response if greedy decoding would write it.
    """
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return {"response": "", "reference": target, "log_likelihoods": answers}
    values = [value for value, _ in answers]
    if task.OUTPUT_TYPE == "loglikelihood":
        return {"response": target if answers[0][1] else "", "reference": target, "log_likelihoods": values}
    choices = [str(choice) for choice in task.doc_to_choice(doc)]
    values = values[: len(choices)]  # log-likelihoods without the question may follow
    if task.multiple_input:
        target = task.doc_to_text(doc)
    right = [choices[one] if isinstance(one, int) and one < len(choices) else one for one in _flat(target)]
    return {
        "response": choices[values.index(max(values))],
        "reference": right if isinstance(target, list) else right[0],
        "choices": choices,
        "log_likelihoods": values,
    }


def _plain(score: Any) -> Any:
    """A score as Python's own bool or finite number, or a list of them; None for anything else."""
    if isinstance(score, list):
        values = [_plain(value) for value in score]
        return values if values and None not in values else None
    value = score.item() if hasattr(score, "item") else score  # numpy's
    return value if isinstance(value, bool | int | float) and math.isfinite(value) else None


def _flat(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _finished(row: Row, scored: list[str], shares: set[str]) -> Row:
    """The row with its scores before the token counts; the scores of a share are true or false."""
    scores, counts = row.pop(SCORES), {name: row.pop(name) for name in ("tokens", "cut_off") if name in row}
    for name in shares:
        score = scores[name]
        scores[name] = [bool(one) for one in score] if isinstance(score, list) else bool(score)
    return row | {name: scores[name] for name in scored} | counts
