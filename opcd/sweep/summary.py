"""The results of a sweep as CSV and Markdown: a row for each arm, and for each group of arms over seeds."""

import csv
import io
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from opcd.results.run_files import clock, figures, is_finite
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.output import csv_cell, markdown
from opcd.sweep.job_engine import Task
from opcd.sweep.sweep_plan import Arm

SEEDS = ("seed_everything", "data.seed")
SHOWN = (
    "train/divergence",
    "val/divergence",
    "samples/right_before",
    "samples/right",
    "context/recovery",
    "context/drift",
    "student/bytes",
    "seconds/step",
    "memory/peak_mib",
)
LISTED = 20
"""Most problems in a summary."""


@dataclass
class ArmResult:
    """An arm and its results."""

    arm: Arm
    task: Task
    numbers: dict[str, float]
    """Metric -> value; empty if the arm has not finished."""
    problems: list[str] = field(default_factory=list)
    """Parts of its folder that could not be read."""

    @classmethod
    def of(cls, arm: Arm, task: Task) -> "ArmResult":
        """Read the numbers of a finished arm."""
        problems: list[str] = []
        numbers = figures(task.folder.run, problems) if task.status == "finished" else {}
        return cls(arm, task, numbers, problems)


def write_summary(folder: Path, results: Sequence[ArmResult]) -> None:
    """Write summary.csv (all settings and metrics) and summary.md (the main metrics)."""
    write_atomic(folder / "summary.csv", as_csv(results))
    write_atomic(folder / "summary.md", as_markdown(results))


def as_csv(results: Sequence[ArmResult]) -> str:
    """All settings and metrics, a row for each arm."""
    settings = list(dict.fromkeys(key for result in results for key in result.arm.settings))
    metrics = list(dict.fromkeys(name for result in results for name in result.numbers))
    rows = [["arm", "status", "seconds", *settings, *metrics]]
    for result in results:
        values = [result.arm.settings.get(key, "") for key in settings]
        cells = [value if isinstance(value, str) else json.dumps(value) for value in values]
        numbers = [str(result.numbers.get(name, "")) for name in metrics]
        rows.append([result.arm.name, result.task.status, f"{result.task.seconds:.1f}", *cells, *numbers])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(csv_cell, row) for row in rows])
    return text.getvalue()


def as_markdown(results: Sequence[ArmResult]) -> str:
    """A table with a row for each arm, and one with mean and sample standard deviation over several seeds."""
    known = list(dict.fromkeys(name for result in results for name in result.numbers))
    # The first metric of an evaluation has bounds.
    bounded = [name for name in known if name + "_low" in known and name not in SHOWN]
    shown = [name for name in SHOWN if name in known] + bounded
    rows = [
        [r.arm.name, r.task.status, clock(r.task.seconds), *(_with_bounds(r.numbers, name) for name in shown)]
        for r in results
    ]
    text = markdown_table(["arm", "status", "time", *shown], rows)
    groups = by_seed(results)
    if any(len(group) > 1 for group in groups.values()):
        rows = [
            [
                name,
                str(len(group)),
                *(mean_and_spread([r.numbers[metric] for r in group if metric in r.numbers]) for metric in shown),
            ]
            for name, group in groups.items()
        ]
        text += "\nOver seeds (mean ± sample standard deviation of the finished arms):\n\n"
        text += markdown_table(["settings", "arms", *shown], rows)
    if left_out := [f"- {markdown(f'{r.arm.name}: {problem}')}\n" for r in results for problem in r.problems]:
        text += f"\nLeft out, or not finite:\n\n{''.join(left_out[:LISTED])}"
        text += f"- and {len(left_out) - LISTED} more\n" if len(left_out) > LISTED else ""
    return text


def by_seed(results: Sequence[ArmResult]) -> dict[str, list[ArmResult]]:
    """Groups of arms that differ in their seed alone, by the rest of their names."""
    groups: dict[str, list[ArmResult]] = {}
    for result in results:
        rest = {key: value for key, value in result.arm.settings.items() if key not in SEEDS}
        groups.setdefault(json.dumps(rest, sort_keys=True), []).append(result)
    seeds = tuple(key.rpartition(".")[2] for key in SEEDS)
    names = [[part for part in group[0].arm.name.split(",") if not part.startswith(seeds)] for group in groups.values()]
    return {",".join(name) or "all": group for name, group in zip(names, groups.values(), strict=True)}


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; a single value alone, a dash without values."""
    if not values:
        return "-"
    if not all(map(is_finite, values)):
        return ", ".join(map(_number, values))
    mean = _number(statistics.fmean(values))
    return mean if len(values) == 1 else f"{mean} ± {_number(statistics.stdev(values))}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, with markup in cells escaped."""
    lines = [
        [markdown(cell) for cell in header],
        ["---"] * len(header),
        *([markdown(cell) for cell in row] for row in rows),
    ]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _with_bounds(numbers: dict[str, float], name: str) -> str:
    """A value, with its 95 % interval if known."""
    text = _number(numbers.get(name))
    bounds = [_number(numbers[name + end]) for end in ("_low", "_high") if name + end in numbers]
    return f"{text} ({' to '.join(bounds)})" if bounds else text


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
