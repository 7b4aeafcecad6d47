"""Plots as SVG text, drawn by matplotlib without a screen."""

import io
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from opcd.results.run_files import is_finite
from opcd.runtime.extras import require
from opcd.runtime.output import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curve = Sequence[tuple[int, float]]
"""(step, value)."""

SIZE = (7.2, 4.2)  # inches


def drawn(draw: "Callable[[Axes], None]", title: str, x: str, y: str, seed: str = "opcd") -> str:
    """An SVG with one pair of axes; text stays text, and ids begin with what `seed` makes of them.

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
    with own, warnings.catch_warnings():  # the browser has the letters that matplotlib's font lacks
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


def curves(axes: "Axes", groups: Mapping[str, Sequence[Curve]]) -> None:
    """A line for the mean of each group's curves, and a band from the least to the greatest of them."""
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
        if len(members) > 1:
            low, high = ([bound(by_step[s]) for s in steps] for bound in (min, max))
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def bars(axes: "Axes", values: Mapping[str, Sequence[float]]) -> None:
    """A horizontal bar for the mean of each group, a dot for each member."""
    finite = {name: [value for value in members if is_finite(value)] for name, members in values.items()}
    values = {_label(name): members for name, members in finite.items() if members}
    names = list(values)[::-1]
    axes.barh(names, [statistics.fmean(values[name]) for name in names], height=0.6, alpha=0.6)
    for place, name in enumerate(names):
        axes.plot(values[name], [place] * len(values[name]), "k.", markersize=4)


def points(axes: "Axes", places: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """A mark for the mean of each group, a faint dot for each member, all labelled."""
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
    """A text as SVG can hold it; matplotlib takes one that begins with _ for a name of its own, and leaves it out."""
    text = shown(text, lines=False)
    return f" {text}" if text.startswith("_") else text


def _unique_ids(svg: str, seed: str) -> str:
    """The <svg> element alone, its ids told apart from those of other plots on one page."""
    svg = svg[svg.index("<svg") :]
    prefix = re.sub(r"\W", "-", seed)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    return re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
