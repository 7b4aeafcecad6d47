"""Tables of a report: the runs, their answers, evaluations and differences."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.evaluation.result_files import SUMMARY
from opcd.evaluation.scores import Metric, Row, summarise
from opcd.results.run_files import (
    Series,
    clock,
    figures,
    is_finite,
    read_config,
    read_jsonl,
    read_metrics,
    read_object,
    read_samples,
    share_right,
)
from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError
from opcd.runtime.files.run_folder import former_run
from opcd.runtime.system_info import FILE
from opcd.tasks.matching import right

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""
NOT_SCORES = ("index", "sample", "seed", "tokens", "turns", "reference", "log_likelihoods")
"""Fields of an answer that may be numbers but are no scores."""
ANSWERS = re.compile(r"step=(?P<step>\d+)-(?P<task>.+)\.jsonl")
NONE = "-"
CONFIG = "config.yaml"


@dataclass(frozen=True)
class Run:
    """The content of a run's folder.

    Attributes:
        name: the path that the user gave.
        config: config.yaml, without trainer.default_root_dir.
        series: metrics.csv.
        numbers: one number for each metric.
        samples: samples.jsonl.
        environment: environment.json; empty for a run that the command did not make.
        problems: the parts that could not be read, or are not finite.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    series: Series
    numbers: dict[str, float]
    samples: list[Row]
    environment: dict[str, Any]
    problems: list[str]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Read a run from its folder. UserError if the folder is not a run's."""
        problems: list[str] = []
        return cls(
            name=str(folder),
            folder=folder,
            config=_config(folder, problems),
            series=read_metrics(folder, problems),
            numbers=figures(folder),
            samples=read_samples(folder, problems),
            environment=_environment(folder, problems),
            problems=problems,
        )

    @property
    def steps(self) -> int:
        """Optimizer steps with metrics; the first one is logged as step 0."""
        return max((step + 1 for step, _ in self.series.get("train/divergence", [])), default=0)

    def right(self, context: bool, last: bool) -> str:
        """The number of right sample answers at the first or the last step; a dash if unknown."""
        rows = [row for row in self.samples if row["context"] == context]
        step = (max if last else min)((row["step"] for row in rows), default=0)
        if step and not last and not context:  # a run that resumed with other queries has no answers from before
            return NONE
        rows = [row for row in rows if row["step"] == step and row["reference"] is not None]
        return f"{sum(map(right, rows))} of {len(rows)}" if share_right(rows) is not None else NONE


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Read all trainings, in the order given. A run that another one resumed is a part of it.

    Raises:
        UserError: a folder is not a run's, or is named twice.
    """
    folders = list(folders)
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise UserError(f"RUN: {folder} is named twice")
    parts = {part for folder in folders for part in _resumed(folder)}
    return [Run.read(folder) for folder in folders if folder.resolve() not in parts]


def _resumed(folder: Path) -> list[Path]:
    """The runs that a run resumed, the last one first."""
    found: list[Path] = []
    former = former_run(folder)
    while former is not None and former != folder.resolve() and former not in found:
        found.append(former)
        former = former_run(former)
    return found


def overview(runs: Sequence[Run]) -> Table:
    """A row for each run: steps, right answers, the last divergence, time and memory."""
    header = (
        *("run", "steps", "right before", "right after", "with the context", "recovery", "drift, nats a token"),
        "divergence at the end, nats a token",
    )
    rows = [
        (
            *(run.name, str(run.steps), run.right(False, False), run.right(False, True), run.right(True, True)),
            *(_number(run.numbers.get(f"context/{name}")) for name in ("recovery", "drift")),
            _number(run.numbers.get("train/divergence")),
            clock(sum(seconds for _, seconds in run.series.get("seconds/step", []) if is_finite(seconds))),
            _number(run.numbers.get("seconds/step")),
            _number(run.numbers["memory/peak_mib"] / 1024 if "memory/peak_mib" in run.numbers else None),
        )
        for run in runs
    ]
    return (*header, "time of all steps", "seconds a step", "peak memory, GiB"), rows


def all_numbers(runs: Sequence[Run]) -> Table:
    """A row for each metric, a column for each run."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    rows = [(name, *(_number(run.numbers.get(name)) for run in runs)) for name in sorted(names)]
    return ("metric", *(run.name for run in runs)), rows


def differences(runs: Sequence[Run]) -> Table:
    """Config keys at which a run differs from the first, with a column for each run."""
    keys = dict.fromkeys(key for run in runs[1:] for key in changed_keys(runs[0].config, run.config))
    return ("key", *(run.name for run in runs)), [(key, *(_at(run.config, key) for run in runs)) for key in keys]


def environments(runs: Sequence[Run]) -> Table:
    """The start, machine and package versions, with a column for each run."""
    columns: list[dict[str, Any]] = []
    for environment in (run.environment for run in runs):
        parts = {**environment.get("machine", {}), **environment.get("versions", {})}
        columns.append({"began": environment.get("began", NONE)} | {str(name): str(v) for name, v in parts.items()})
    names = dict.fromkeys(name for column in columns for name in column)
    rows = [(name, *(column.get(name, NONE) for column in columns)) for name in names]
    return ("", *(run.name for run in runs)), rows


def questions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each sample query, with the answers of every run before, after, and with the context."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        # A damaged run may have no answers without the context.
        steps = [row["step"] for row in run.samples if not row["context"]] or [0]
        for row in run.samples:
            if not row["context"] and row["step"] not in (min(steps), max(steps)):
                continue
            begin = "before" if min(steps) == 0 else f"at step {min(steps)}"
            when = "with the context" if row["context"] else begin if row["step"] == min(steps) else "after"
            question = found.setdefault(row["query"], {"query": row["query"], "reference": row["reference"]})
            mark = None if row["reference"] is None else right(row)
            answer = {"who": f"{run.name}, {when}" if len(runs) > 1 else when, "right": mark, "text": row["answer"]}
            question.setdefault("answers", []).append(answer)
    return list(found.values())


def evaluations(runs: Sequence[Run]) -> Table:
    """All metrics with intervals, from the last answers of `LMEval` and every results.json.

    Parts that cannot be read are added to each run's problems.
    """
    rows = []
    for run in runs:
        found = (*_inside_training(run.folder, run.problems), *_results(run.folder, run.problems))
        for where, task, n, metrics in found:
            rows += [(run.name, where, task, str(n), name, *_interval(metric)) for name, metric in metrics.items()]
    return ("run", "where", "task", "questions", "metric", "value", "95 % interval"), rows


def _config(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The config without trainer.default_root_dir; empty if it cannot be read, which is a problem."""
    try:
        config = read_config(folder)
    except UserError as error:
        if not (folder / CONFIG).exists():
            raise
        problems.append(f"{CONFIG}: left out: {error}")
        return {}
    if isinstance(trainer := config.get("trainer"), dict):
        trainer.pop("default_root_dir", None)
    return config


def _environment(folder: Path, problems: list[str]) -> dict[str, Any]:
    """The content of environment.json, without parts of another type."""
    found = read_object(folder / FILE, problems)
    kinds = {"command": str, "began": str, "machine": dict, "versions": dict}
    if wrong := [name for name, kind in kinds.items() if not isinstance(found.get(name, kind()), kind)]:
        problems.append(f"{FILE}: left out: {', '.join(wrong)} of another type")
    return {name: value for name, value in found.items() if name not in wrong}


def _inside_training(folder: Path, problems: list[str]) -> Iterable[tuple[str, str, int, dict[str, Metric]]]:
    last: dict[tuple[Path, str], int] = {}
    for file in sorted(folder.glob("*/step=*.jsonl")):
        if name := ANSWERS.fullmatch(file.name):
            key = (file.parent, name["task"])
            last[key] = max(int(name["step"]), last.get(key, 0))
    for (parent, task), step in last.items():
        file = parent / f"step={step}-{task}.jsonl"
        rows = read_jsonl(file, problems)
        first = rows[0] if rows else {}
        scores = [name for name, value in first.items() if name not in NOT_SCORES and _is_score(value)]
        numbered = [row for row in rows if isinstance(row.get("index"), int)]
        whole = [row for row in numbered if all(_is_score(row.get(name)) for name in scores)]
        if rows and not scores:
            problems.append(f"{parent.name}/{file.name}: no scores of single answers: the values are in metrics.csv")
        elif len(whole) < len(rows) or not scores:
            problems.append(f"{parent.name}/{file.name}: {len(whole)} of {len(rows)} answers have their scores")
        if not whole or not scores:
            continue
        try:
            metrics = summarise(whole, scores)
        except ValueError as error:  # some questions have more answers than others
            problems.append(f"{parent.name}/{file.name}: left out: {error}")
            continue
        yield f"{parent.name}, step {step}", task, len({row["index"] for row in whole}), metrics


def _results(folder: Path, problems: list[str]) -> Iterable[tuple[str, str, int, dict[str, Metric]]]:
    for file in sorted(folder.rglob(SUMMARY)):
        where = str(file.parent.relative_to(folder))
        found: list[str] = []
        tasks = read_object(file, found).get("tasks")
        problems += [f"{where}/{problem}" for problem in found]
        if not isinstance(tasks, dict) and not found:
            problems.append(f"{where}/{SUMMARY}: left out: it has no tasks")
        for task, result in tasks.items() if isinstance(tasks, dict) else ():
            try:
                metrics = {str(name): _metric(value) for name, value in result["metrics"].items()}
                yield where, str(task), int(result["n"]), metrics
            except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
                problems.append(f"{where}/{SUMMARY}: left out: {task} is of another shape: {error!r}")


def _metric(value: dict[str, Any]) -> Metric:
    """A metric of results.json. KeyError, TypeError or ValueError for another value."""
    low, high = (None if value.get(end) is None else float(value[end]) for end in ("low", "high"))
    return Metric(float(value["value"]), low, high, str(value["note"]) if value.get("note") else None)


def _is_score(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, bool | int | float) and is_finite(one) for one in values)


def _interval(metric: Metric) -> tuple[str, str]:
    known = metric.low is not None and metric.high is not None
    return f"{metric.value:.3f}", f"{metric.low:.3f} to {metric.high:.3f}" if known else metric.note or NONE


def _at(config: Any, key: str) -> str:
    """The value at a dotted key, as JSON; a dash without the key."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return NONE
        config = config[part]
    return json.dumps(config, ensure_ascii=False, default=str)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"
