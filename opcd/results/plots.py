"""Plots as SVG text, drawn by matplotlib without a screen."""

import io
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from opcd.results.run_files import is_finite, right_over_steps
from opcd.results.run_tables import Run
from opcd.runtime.extras import require
from opcd.runtime.output import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[int, float]]
"""(step, value)."""

SIZE = (7.2, 4.2)  # inches
RIGHT = "samples/right"
FIRST = {
    "train/divergence": "nats a token",
    "val/divergence": "nats a token",
    RIGHT: "share of the sample answers",
    "context/recovery": "share of the context's effect",
    "context/drift": "nats a token",
    "train/gradient_norm": "norm before clipping",
    "train/response_tokens": "tokens",
    "train/student_entropy": "nats a token",
    "train/teacher_entropy": "nats a token",
}
"""The first metrics of a report -> units."""


def plots(runs: Sequence[Run]) -> dict[str, str]:
    """Metric -> SVG with a line for each run, for metrics that change. Of seconds, only those of a step are drawn.

    A metric that is logged with its interval (`_low` and `_high`) gets a band.

    Raises:
        UserError: matplotlib is not installed.
    """
    series = [run.series | {RIGHT: right_over_steps(run.folder)} for run in runs]
    others = {name for one in series for name in one if not name.endswith(("_low", "_high"))}
    names = [*FIRST, *sorted(others - set(FIRST))]
    found = {}
    for name in names:
        groups = {run.name: [one[name]] for run, one in zip(runs, series, strict=True) if one.get(name)}
        changes = any(len({value for _, value in curve if is_finite(value)}) > 1 for (curve,) in groups.values())
        if changes and (name == "seconds/step" or not name.startswith("seconds/")):
            bounds = {
                run.name: (one[f"{name}_low"], one[f"{name}_high"])
                for run, one in zip(runs, series, strict=True)
                if one.get(f"{name}_low") and one.get(f"{name}_high")
            }
            found[name] = drawn(partial(curves, groups=groups, bounds=bounds), name, "step", FIRST.get(name, ""), name)
    return found


def drawn(draw: "Callable[[Axes], None]", title: str, x: str, y: str, seed: str = "opcd") -> str:
    """Draw an SVG with one pair of axes. Text stays text, and `seed` makes its ids unique on a page.

    Raises:
        UserError: matplotlib is not installed.
    """
    require("plots", "matplotlib", "a plot")
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    own = rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": seed,
            "font.size": 9,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "text.parse_math": False,  # a $ in a name begins no formula
        }
    )
    with own, warnings.catch_warnings():  # the browser has letters that matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title=_label(title), xlabel=_label(x), ylabel=_label(y))
        if axes.get_legend_handles_labels()[1]:
            figure.legend(loc="outside right upper", fontsize=7)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _unique_ids(text.getvalue(), seed)


def curves(
    axes: "Axes", groups: Mapping[str, Sequence[Curve]], bounds: Mapping[str, tuple[Curve, Curve]] | None = None
) -> None:
    """Draw a line for the mean of each group's curves, and a band from the least to the greatest.

    `bounds` are the lower and the upper curve of a group of one.
    """
    for name, members in groups.items():
        by_step: dict[int, list[float]] = {}
        for curve in members:
            for step, value in curve:
                if is_finite(value):
                    by_step.setdefault(step, []).append(value)
        steps = sorted(by_step)
        if not steps:
            continue
        (line,) = axes.plot(
            steps, [statistics.fmean(by_step[s]) for s in steps], label=_label(name), marker=".", markersize=3
        )
        band = {s: (min(by_step[s]), max(by_step[s])) for s in steps if len(members) > 1}
        if bounds and name in bounds:
            low, high = (dict(curve) for curve in bounds[name])
            both = sorted(low.keys() & high.keys())
            band = {s: (low[s], high[s]) for s in both if is_finite(low[s]) and is_finite(high[s])}
        if band:
            least, most = zip(*band.values(), strict=True)
            axes.fill_between(list(band), least, most, color=line.get_color(), alpha=0.15, linewidth=0)


def bars(axes: "Axes", values: Mapping[str, Sequence[float]]) -> None:
    """Draw a horizontal bar for the mean of each group, and a dot for each member."""
    finite = {name: [value for value in members if is_finite(value)] for name, members in values.items()}
    values = {_label(name): members for name, members in finite.items() if members}
    names = list(values)[::-1]
    axes.barh(names, [statistics.fmean(values[name]) for name in names], height=0.6, alpha=0.6)
    for place, name in enumerate(names):
        axes.plot(values[name], [place] * len(values[name]), "k.", markersize=4)


def points(axes: "Axes", places: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Draw a labelled mark for the mean of each group, and a faint dot for each member."""
    for number, (name, members) in enumerate(places.items()):
        members = [member for member in members if all(map(is_finite, member))]
        if not members:
            continue
        x, y = ([member[axis] for member in members] for axis in (0, 1))
        mark = "osD^vP*X<>"[number % 10]
        (mean,) = axes.plot([statistics.fmean(x)], [statistics.fmean(y)], mark, label=_label(name), markersize=7)
        if len(members) > 1:
            axes.plot(x, y, mark, color=mean.get_color(), alpha=0.3, markersize=4)


def _label(text: str) -> str:
    """A text for SVG. matplotlib would leave out a label that begins with _."""
    text = shown(text, lines=False)
    return f" {text}" if text.startswith("_") else text


def _unique_ids(svg: str, seed: str) -> str:
    """The <svg> element alone, with ids that differ from those of other plots on a page."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", seed)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
