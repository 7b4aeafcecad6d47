"""The files in a run's folder: the metrics over the steps, and the sample answers.

A killed run leaves a cut last line, and a file may have been changed since. Complete rows are read. Others are left
out, and named in the list `problems` of the caller.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from opcd.runtime.did_you_mean import beside
from opcd.runtime.errors import UserError
from opcd.runtime.files.run_folder import FORMER_METRICS, METRICS
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.runtime.files.user_files import read_text
from opcd.tasks.matching import right

Series = dict[str, list[tuple[int, float]]]
"""Name -> (step, value), in the order of logging."""
Shape = Mapping[str, Any]
"""Field -> its type. A row may have other fields too."""
SAMPLE: Shape = {"step": int, "query": str, "reference": str | None, "context": bool, "answer": str}
"""A line of samples.jsonl."""
GREATEST = 1e300
"""Numbers from here on count as infinite: sums and plots overflow."""
LAST = 10**12
"""The largest step."""


def read_config(run: Path) -> dict[str, Any]:
    """The config of a run.

    Raises:
        UserError: the folder is not a run's, or its config cannot be read.
    """
    file = run / "config.yaml"
    if not run.is_dir():
        raise UserError(f"no folder {run.absolute()}{beside(run)}")
    if not file.is_file():
        raise UserError(f"{run.resolve()} holds no run of `opcd fit`: it has no config.yaml")
    config = load_yaml(read_text(file, "RUN"), str(file))
    if not isinstance(config, dict):
        raise UserError(f"{file}: no config of a run, but {type(config).__name__}")
    return config


def read_metrics(run: Path, problems: list[str] | None = None) -> Series:
    """The columns of metrics.csv, after those of the runs that this one resumed (`KeepHistory`).

    Empty without such a file (trainer.logger: false).

    Args:
        problems: gets the rows that were left out, and the metrics that are not finite.
    """
    problems = [] if problems is None else problems
    series: Series = {}
    for name in (FORMER_METRICS, METRICS):
        _add_metrics(series, run / name, problems)
    for name, points in series.items():
        if odd := [(step, value) for step, value in points if not is_finite(value)]:
            more = f" and at {len(odd) - 1} more steps" if len(odd) > 1 else ""
            problems.append(f"{METRICS}: {name} is {odd[0][1]:g} at step {odd[0][0]}{more}")
    return series


def read_jsonl(file: Path, problems: list[str] | None = None, first: int | None = None) -> list[dict[str, Any]]:
    """The rows of a file that are JSON objects; none if there is no file.

    Args:
        problems: gets the rows that were left out.
        first: number of lines that are read; None for all.
    """
    problems = [] if problems is None else problems
    rows = []
    for number, line in enumerate(_bytes(file, problems).split(b"\n")[:first], start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            else:
                problems.append(f"{file.name}:{number}: left out: no JSON object; it may have been cut")
    return rows


def read_object(file: Path, problems: list[str]) -> dict[str, Any]:
    """The object of a JSON file. Empty if there is no file, or if it has no object, which is a problem."""
    text = _bytes(file, problems)
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return value
        problems.append(f"{file.name}: left out: no JSON object")
    except (ValueError, RecursionError) as error:
        if file.is_file():
            why = f"not valid JSON: {error}" if text else "it is empty, or cannot be read"
            problems.append(f"{file.name}: left out: {why}")
    return {}


def read_samples(run: Path, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """The sample answers of a run, without lines of another shape."""
    return read_shaped(run / "samples.jsonl", SAMPLE, problems)


def read_shaped(
    file: Path,
    shape: Shape,
    problems: list[str] | None = None,
    fits: Callable[[dict[str, Any]], bool] | None = None,
    first: int | None = None,
) -> list[dict[str, Any]]:
    """The rows of a file that have the fields of a shape, and pass the test `fits`."""
    problems = [] if problems is None else problems
    rows = []
    for row in read_jsonl(file, problems, first):
        if wrong := misfits(row, shape):
            problems.append(f"{file.name}: a line left out: {', '.join(wrong)} missing, or of another type")
        elif fits is not None and not fits(row):
            problems.append(f"{file.name}: a line left out: of another shape")
        else:
            rows.append(row)
    return rows


def misfits(row: Mapping[str, Any], shape: Shape) -> list[str]:
    """The fields of a shape that a row lacks, or that have another type or are not finite."""
    return [name for name, kind in shape.items() if name not in row or not _fits(row[name], kind)]


def _fits(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return isinstance(True, kind) and kind is not int
    if isinstance(value, int | float) and isinstance(0, kind) | isinstance(0.0, kind):
        return is_finite(value) and (isinstance(value, kind) or isinstance(0.0, kind)) and abs(value) <= LAST
    return isinstance(value, kind)


def is_finite(value: float) -> bool:
    """Whether a number can be summed and drawn."""
    return abs(value) < GREATEST  # False for nan


def share_right(rows: list[dict[str, Any]], rule: Callable[[dict[str, Any]], bool] = right) -> float | None:
    """The share of right answers among those with a reference; None without any."""
    known = [rule(row) for row in rows if row["reference"] is not None]
    return sum(known) / len(known) if known else None


def right_over_steps(run: Path, problems: list[str] | None = None) -> list[tuple[int, float]]:
    """(step, share of right sample answers without the context)."""
    rows = [row for row in read_samples(run, problems) if not row["context"]]
    steps = sorted({row["step"] for row in rows})
    shares = [(step, share_right([row for row in rows if row["step"] == step])) for step in steps]
    return [(step, share) for step, share in shares if share is not None]


def figures(run: Path, problems: list[str] | None = None) -> dict[str, float]:
    """One number for each metric (the mean of seconds, else the last value), the share of right sample answers, and the
    bytes of the student's weights, or of its adapter.

    Args:
        problems: gets the parts that could not be read.
    """
    numbers = {}
    for name, points in read_metrics(run, problems).items():
        values = [value for _, value in points]
        finite = [value for value in values if is_finite(value)]
        numbers[name] = fmean(finite) if name.startswith("seconds/") and finite else values[-1]
    if curve := right_over_steps(run, problems):
        numbers |= {"samples/right": curve[-1][1]}
        if curve[0][0] == 0:  # unknown for a run that resumed with other queries
            numbers |= {"samples/right_before": curve[0][1]}
    if weights := [file.stat().st_size for file in (run / "student").glob("*.safetensors")]:
        numbers["student/bytes"] = float(sum(weights))
    return numbers


def _add_metrics(series: Series, file: Path, problems: list[str]) -> None:
    for line, row in _csv_rows(file, problems):
        step = _number(row.pop("step", ""))
        if step is None or not step.is_integer() or abs(step) > LAST:
            problems.append(f"{file.name}:{line}: left out: it has no step")
            continue
        row.pop("epoch", None)
        for name, text in row.items():
            value = _number(text)
            if value is not None:
                series.setdefault(name, []).append((int(step), value))
            elif text:
                problems.append(f"{file.name}:{line}: left out: {name} is no number, but {text[:40]!r}")


def _bytes(file: Path, problems: list[str]) -> bytes:
    """The content of a file. Empty if there is none, or if it cannot be read, which is a problem."""
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError as error:
        problems.append(f"{file.name}: cannot be read: {error.strerror}")
        return b""


def _csv_rows(file: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line, cells by column) of each complete row."""
    data = _bytes(file, problems)
    text = data.decode("utf-8", "replace")
    reader = csv.reader(io.StringIO(text, newline=""))
    header: list[str] | None = None
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problems.append(f"{file.name}:{reader.line_num}: left out: {error}")
            continue
        last = not data.endswith(b"\n") and reader.line_num == text.count("\n") + 1
        if last or (header is not None and row and len(row) != len(header)):
            problems.append(f"{file.name}:{reader.line_num}: left out: it was cut, or is no row of this table")
        elif header is None:
            header = row
        elif row:
            yield reader.line_num, dict(zip(header, row, strict=True))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    if not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
