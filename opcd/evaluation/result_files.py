"""The results of an evaluation as files and as a table."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opcd.evaluation.scores import Metric, Results, Row
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.output import plain
from opcd.runtime.versions import installed_version

PACKAGES = ("opcd", "lm-eval", "math-verify", "torch", "transformers")
SUMMARY = "results.json"


def refuse_results(folder: Path, key: str, tasks: Iterable[str]) -> None:
    """Raise UserError if a folder has files of the same names as the results, or cannot be written."""
    there = [name for name in (SUMMARY, *(f"{task}.jsonl" for task in tasks)) if (folder / name).exists()]
    if there:
        raise UserError(
            f"{key}: {folder.resolve()} holds {there[0]} already, which would be overwritten; name another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{key}: cannot write to {folder.resolve()}: {error.strerror}") from error


def write_results(
    folder: Path, results: Results, differences: dict[str, dict[str, Metric]], about: dict[str, Any]
) -> None:
    """Write TASK.jsonl for every task, and results.json last: the results are complete if that file exists.

    Args:
        folder: an existing folder.
        results: the results by task.
        differences: differences to other results, by task and metric; may be empty.
        about: model, context, seed, settings and other facts, copied into results.json.
    """
    for name, result in results.items():
        write_rows(folder / f"{name}.jsonl", result.rows)
    summary = {
        **about,
        "versions": {package: installed_version(package) for package in PACKAGES},
        "tasks": {
            name: {"n": result.n, "metrics": _plain(result.metrics)}
            | ({"difference": _plain(differences[name])} if name in differences else {})
            for name, result in results.items()
        },
    }
    write_atomic(folder / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _plain(metrics: dict[str, Metric]) -> dict[str, Any]:
    """The metrics for JSON; there is a note only if there is something to say."""
    return {
        name: {key: part for key, part in asdict(metric).items() if part is not None or key != "note"}
        for name, metric in metrics.items()
    }


def write_rows(file: Path, rows: Iterable[Row]) -> None:
    """Write answers as JSONL, atomically."""
    write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def print_results(results: Results, differences: dict[str, dict[str, Metric]], console: Console) -> None:
    """Print a table of all metrics with intervals, and with differences to other results if there are any."""
    table = Table("task", "questions", "metric", "value", "95 % interval")
    if differences:
        table.add_column("difference (95 % interval)")
    for name, result in results.items():
        for number, (metric, value) in enumerate(result.metrics.items()):
            first = (name, str(result.n)) if number == 0 else ("", "")
            gap = differences.get(name, {}).get(metric)
            last = [f"{gap.value:+.3f} {_interval(gap)}" if gap else ""] if differences else []
            table.add_row(*map(plain, first), plain(metric), f"{value.value:.3f}", _interval(value), *last)
    console.print(table)


def _interval(metric: Metric) -> str:
    if metric.low is None or metric.high is None:
        return metric.note or ""
    return f"{metric.low:.3f} to {metric.high:.3f}"
