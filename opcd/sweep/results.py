"""What a run's folder says: its metrics over the steps, and its sample answers."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from opcd.callbacks.right import right
from opcd.did_you_mean import beside
from opcd.errors import UserError

Series = dict[str, list[tuple[int, float]]]
"""Name -> (step, value), in the order in which they were logged."""


def read_config(run: Path) -> dict[str, Any]:
    """The whole config of a run.

    Raises:
        UserError: the folder holds no run.
    """
    file = run / "config.yaml"
    if not run.is_dir():
        raise UserError(f"no folder {run.absolute()}{beside(run)}")
    if not file.is_file():
        raise UserError(f"{run.resolve()} holds no run of `opcd fit`: it has no config.yaml")
    config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return config


def read_metrics(run: Path) -> Series:
    """The columns of metrics.csv; none where there is no such file (trainer.logger false)."""
    series: Series = {}
    file = run / "metrics.csv"
    if not file.exists():
        return series
    with file.open(newline="", encoding="utf-8") as stream:
        for row in csv.DictReader(stream):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]), float(value)))
    return series


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a file; none where there is no such file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def share_right(rows: list[dict[str, Any]], rule: Callable[[dict[str, Any]], bool] = right) -> float | None:
    """The share of right answers among those that have a reference, or None where none has."""
    known = [rule(row) for row in rows if row["reference"] is not None]
    return sum(known) / len(known) if known else None


def right_over_steps(run: Path) -> list[tuple[int, float]]:
    """(step, share of right answers without the context) of the sample answers."""
    rows = [row for row in read_jsonl(run / "samples.jsonl") if not row["context"]]
    steps = sorted({row["step"] for row in rows})
    shares = [(step, share_right([row for row in rows if row["step"] == step])) for step in steps]
    return [(step, share) for step, share in shares if share is not None]


def figures(run: Path) -> dict[str, float]:
    """One number a metric: the mean of seconds, the last value of everything else; and the samples' right share."""
    numbers = {}
    for name, points in read_metrics(run).items():
        values = [value for _, value in points]
        numbers[name] = sum(values) / len(values) if name.startswith("seconds/") else values[-1]
    if curve := right_over_steps(run):
        numbers |= {"samples/right_before": curve[0][1], "samples/right": curve[-1][1]}
    return numbers
