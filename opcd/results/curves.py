"""The curves of a report: a plot a metric, a line a run."""

from collections.abc import Sequence
from functools import partial

from opcd.results.plots import curves, drawn
from opcd.results.run_files import is_finite, right_over_steps
from opcd.results.run_tables import Run

RIGHT = "samples/right"
FIRST = {
    "train/divergence": "nats a token",
    "val/divergence": "nats a token",
    RIGHT: "share of the sample answers",
    "train/gradient_norm": "norm before clipping",
    "train/response_tokens": "tokens",
    "train/student_entropy": "nats a token",
    "train/teacher_entropy": "nats a token",
}
"""What is shown first, and in what unit."""
PARTS = "seconds/"
STEP = "seconds/step"


def plots(runs: Sequence[Run]) -> dict[str, str]:
    """Metric -> SVG, for every metric that changed over the steps of a run; seconds of a step's parts are left out.

    Raises:
        UserError: matplotlib is not installed.
    """
    series = [run.series | {RIGHT: right_over_steps(run.folder)} for run in runs]
    names = [*FIRST, *sorted({name for one in series for name in one} - set(FIRST))]
    found = {}
    for name in names:
        groups = {run.name: [one[name]] for run, one in zip(runs, series, strict=True) if one.get(name)}
        if (name.startswith(PARTS) and name != STEP) or not any(_changes(curve) for (curve,) in groups.values()):
            continue
        found[name] = drawn(partial(curves, groups=groups), name, "step", FIRST.get(name, ""), name)
    return found


def _changes(curve: Sequence[tuple[int, float]]) -> bool:
    return len({value for _, value in curve if is_finite(value)}) > 1
