"""What a report says of its runs: tables of them, their answers, evaluations and differences."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.callbacks.right import right
from opcd.changes import changed_keys
from opcd.environment import FILE
from opcd.errors import UserError
from opcd.evaluation.report import SUMMARY
from opcd.evaluation.results import Metric, Row, summarise
from opcd.sweep.results import Series, figures, read_config, read_jsonl, read_metrics, share_right
from opcd.sweep.table import clock

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""
NOT_SCORES = ("index", "sample", "seed", "tokens", "turns")
"""What an answer's line has beside its scores that is a number as well."""
ANSWERS = re.compile(r"step=(?P<step>\d+)-(?P<task>.+)\.jsonl")
NONE = "-"


@dataclass(frozen=True)
class Run:
    """A run's folder, read.

    Attributes:
        name: the path that it was named by.
        config: config.yaml, without the folder that runs go to.
        series: metrics.csv.
        numbers: one number a metric.
        samples: samples.jsonl.
        environment: environment.json; empty for a run that was not made by the command.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    series: Series
    numbers: dict[str, float]
    samples: list[Row]
    environment: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """From its folder. UserError where that holds no run."""
        config = read_config(folder)
        config.get("trainer", {}).pop("default_root_dir", None)
        file = folder / FILE
        return cls(
            name=str(folder),
            folder=folder,
            config=config,
            series=read_metrics(folder),
            numbers=figures(folder),
            samples=read_jsonl(folder / "samples.jsonl"),
            environment=json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {},
        )

    @property
    def steps(self) -> int:
        """Optimizer steps whose metrics are there; the first one is logged as step 0."""
        return max((step + 1 for step, _ in self.series.get("train/divergence", [])), default=0)

    def right(self, context: bool, last: bool) -> str:
        """How many of the sample answers were right, at the first step or the last; a dash where nobody knows."""
        rows = [row for row in self.samples if row["context"] == context]
        step = (max if last else min)((row["step"] for row in rows), default=0)
        rows = [row for row in rows if row["step"] == step and row["reference"] is not None]
        return f"{sum(map(right, rows))} of {len(rows)}" if share_right(rows) is not None else NONE


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Every run, in the order given.

    Raises:
        UserError: a folder holds no run, or is named twice.
    """
    folders = list(folders)
    for place, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:place]]:
            raise UserError(f"RUN: {folder} is named twice")
    return [Run.read(folder) for folder in folders]


def overview(runs: Sequence[Run]) -> Table:
    """A row a run: steps, right answers, the last divergence, time and memory."""
    header = ("run", "steps", "right before", "right after", "with the context", "divergence at the end, nats a token")
    rows = [
        (
            *(run.name, str(run.steps), run.right(False, False), run.right(False, True), run.right(True, True)),
            _number(run.numbers.get("train/divergence")),
            clock(sum(seconds for _, seconds in run.series.get("seconds/step", []))),
            _number(run.numbers.get("seconds/step")),
            _number(run.numbers["memory/peak_mib"] / 1024 if "memory/peak_mib" in run.numbers else None),
        )
        for run in runs
    ]
    return (*header, "time of all steps", "seconds a step", "peak memory, GiB"), rows


def all_numbers(runs: Sequence[Run]) -> Table:
    """A row a metric, a column a run."""
    names = dict.fromkeys(name for run in runs for name in run.numbers)
    rows = [(name, *(_number(run.numbers.get(name)) for run in runs)) for name in sorted(names)]
    return ("metric", *(run.name for run in runs)), rows


def differences(runs: Sequence[Run]) -> Table:
    """The config keys in which a run is not as the first, a column a run."""
    keys = dict.fromkeys(key for run in runs[1:] for key in changed_keys(runs[0].config, run.config))
    return ("key", *(run.name for run in runs)), [(key, *(_at(run.config, key) for run in runs)) for key in keys]


def environments(runs: Sequence[Run]) -> Table:
    """When and on what each began, and the versions of packages."""
    told = [{"began": run.environment.get("began", NONE), **_parts(run.environment)} for run in runs]
    names = dict.fromkeys(name for one in told for name in one)
    return ("", *(run.name for run in runs)), [(name, *(one.get(name, NONE) for one in told)) for name in names]


def questions(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each sample query, with what every run answered before, after, and with the context."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        steps = [row["step"] for row in run.samples if not row["context"]]
        for row in run.samples:
            if not row["context"] and row["step"] not in (min(steps), max(steps)):
                continue
            when = "with the context" if row["context"] else "before" if row["step"] == min(steps) else "after"
            question = found.setdefault(row["query"], {"query": row["query"], "reference": row["reference"]})
            mark = None if row["reference"] is None else right(row)
            answer = {"who": f"{run.name}, {when}" if len(runs) > 1 else when, "right": mark, "text": row["answer"]}
            question.setdefault("answers", []).append(answer)
    return list(found.values())


def evaluations(runs: Sequence[Run]) -> Table:
    """Every metric with its interval: of the last answers that `LMEval` wrote, and of every results.json."""
    rows = []
    for run in runs:
        for where, task, n, metrics in (*_inside_training(run.folder), *_results(run.folder)):
            rows += [(run.name, where, task, str(n), name, *_interval(metric)) for name, metric in metrics.items()]
    return ("run", "where", "task", "questions", "metric", "value", "95 % interval"), rows


def _inside_training(folder: Path) -> Iterable[tuple[str, str, int, dict[str, Metric]]]:
    last: dict[tuple[Path, str], int] = {}
    for file in sorted(folder.glob("*/step=*.jsonl")):
        if name := ANSWERS.fullmatch(file.name):
            key = (file.parent, name["task"])
            last[key] = max(int(name["step"]), last.get(key, 0))
    for (parent, task), step in last.items():
        rows = read_jsonl(parent / f"step={step}-{task}.jsonl")
        scores = [name for name, value in rows[0].items() if name not in NOT_SCORES and _is_score(value)]
        yield f"{parent.name}, step {step}", task, len({row["index"] for row in rows}), summarise(rows, scores)


def _results(folder: Path) -> Iterable[tuple[str, str, int, dict[str, Metric]]]:
    for file in sorted(folder.rglob(SUMMARY)):
        for task, result in json.loads(file.read_text(encoding="utf-8"))["tasks"].items():
            metrics = {name: Metric(**value) for name, value in result["metrics"].items()}
            yield str(file.parent.relative_to(folder)), task, result["n"], metrics


def _is_score(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(isinstance(one, bool | int | float) for one in values)


def _interval(metric: Metric) -> tuple[str, str]:
    known = metric.low is not None and metric.high is not None
    return f"{metric.value:.3f}", f"{metric.low:.3f} to {metric.high:.3f}" if known else NONE


def _parts(environment: dict[str, Any]) -> dict[str, str]:
    return {**environment.get("machine", {}), **environment.get("versions", {})}


def _at(config: Any, key: str) -> str:
    """The value at a dotted key, as JSON; a dash where the config has none."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return NONE
        config = config[part]
    return json.dumps(config, ensure_ascii=False)


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"
