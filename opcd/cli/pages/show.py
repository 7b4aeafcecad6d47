"""`opcd show RUN`: the lessons of an experience run, the scores of its lists, and attempts, as text and as a page.

opcd show runs/experience
"""

import argparse
import itertools
import json
import re
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from opcd.config.parsing import Parser
from opcd.experience.experience_folder import ATTEMPTS, CONTEXT, EXTRACTIONS, LISTS, SCORES, SELECTION, VALIDATION
from opcd.experience.rounds_table import Round, read_rounds
from opcd.experience.selection import Score, best_of_each
from opcd.results.pages import render
from opcd.results.plots import curves, drawn
from opcd.results.run_files import Shape, misfits, read_object, read_shaped
from opcd.runtime.did_you_mean import beside
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import DiskError, write_atomic
from opcd.runtime.files.user_files import refuse_existing
from opcd.runtime.output import Screen, plain
from opcd.writing.claimed_folder import IDENTITY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = 4
LISTED = 20
"""Most problems that are printed."""
ROUND = re.compile(r"round-([0-9]{1,9})")
SCORE = get_type_hints(Score)
LIST: Shape = {"number": int, "step": int, "lessons": list, "seen": list}
ATTEMPT: Shape = {"list": int, "step": int, "transcript": str, "success": bool | None}
EXTRACTION: Shape = {"list": int, "step": int, "text": str | None}
CHOSEN: Shape = {
    **dict.fromkeys(("number", "step", "lessons", "tokens", "right", "items", "right_without"), int),
    **dict.fromkeys(("success", "low", "high", "success_without", "low_without", "high_without"), float),
}
PAGE = "report.html"


def main(args: list[str]) -> int:
    """Print a run, and write its page.

    Raises:
        UserError: the folder is not of `opcd experience`.
    """
    options = make_parser().parse_args(args)
    if options.page is not None:
        refuse_existing(options.page, "--page")
    page = options.page or options.run / PAGE
    try:
        text = make_page(options.run)
        print_run(options.run)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{options.run.resolve()} has other content than `opcd experience` writes ({why}; --debug shows where)"
        ) from error
    try:
        write_atomic(page, text)
    except DiskError as error:
        raise UserError(f"--page: {error}") from error
    print(f"page: {page}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the --out of an `opcd experience`")
    parser.add_argument("--page", type=Path, help=f"a new file for the page; default: RUN/{PAGE}, which is renewed")
    return parser


@dataclass(frozen=True)
class Part:
    """The files of one pass of the loop.

    Attributes:
        name: "" for a run without rounds.
        selection: selection.json; None if no list is selected yet.
        scores: scores.jsonl.
        lists: lines of lists.jsonl.
        examples: the first attempts, each with the text extracted from it.
        counts: numbers of lines of the files that grow.
        context: the selected list as in a prompt; None if no list is selected yet.
        problems: the parts that could not be read.
    """

    name: str
    selection: dict[str, Any] | None
    scores: list[Score]
    lists: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    counts: dict[str, int]
    context: str | None
    problems: list[str]

    @classmethod
    def read(cls, folder: Path, name: str = "") -> "Part":
        """Read the folder of a pass."""
        problems: list[str] = []
        extracted = read_shaped(folder / EXTRACTIONS, EXTRACTION, problems, first=EXAMPLES)
        extractions = {(r["list"], r["step"]): r for r in extracted}
        attempts = read_shaped(folder / ATTEMPTS, ATTEMPT, problems, first=EXAMPLES)
        selection: dict[str, Any] | None = read_object(folder / SELECTION, problems) or None
        if selection and (wrong := misfits(selection, CHOSEN)):
            problems.append(f"{SELECTION}: left out: {', '.join(wrong)} missing, or of another type")
            selection = None
        context = folder / CONTEXT
        scores = read_shaped(folder / SCORES, SCORE, problems, _is_score)
        return cls(
            name=name,
            selection=selection,
            scores=[Score(**{name: score[name] for name in SCORE}) for score in scores],
            lists=read_shaped(folder / LISTS, LIST, problems, _is_list),
            problems=problems,
            examples=[
                attempt | {"extracted": extractions.get((attempt["list"], attempt["step"]), {}).get("text")}
                for attempt in attempts
            ],
            counts={file: _lines(folder / file) for file in (ATTEMPTS, EXTRACTIONS, VALIDATION)},
            context=context.read_text(encoding="utf-8", errors="replace") if context.exists() else None,
        )

    @property
    def lessons(self) -> list[tuple[str, int]]:
        """The lessons of the selected list, and how often each was written."""
        if self.selection is None:
            return []
        place = (self.selection["number"], self.selection["step"])
        chosen = next((one for one in self.lists if (one["number"], one["step"]) == place), None)
        return list(zip(chosen["lessons"], chosen["seen"], strict=True)) if chosen else []

    @property
    def without(self) -> list[Score]:
        """The score without a list, if there is one."""
        return [score for score in self.scores if score.id is None][:1]

    @property
    def title(self) -> str:
        """The result of the pass, in one line."""
        if self.selection is None:
            return "not finished: " + ", ".join(f"{count} lines in {file}" for file, count in self.counts.items())
        s = self.selection
        helps = "" if s["right"] > s["right_without"] else "; no list was better than none"
        return (
            f"list {s['number']} after {s['step']} steps ({s['lessons']} lessons, {s['tokens']} tokens): "
            f"{s['right']} of {s['items']} right ({_share(s['success'], s['low'], s['high'])}); without lessons "
            f"{s['right_without']} ({_share(s['success_without'], s['low_without'], s['high_without'])}){helps}"
        )


def read_run(run: Path) -> tuple[list[Round], list[Part]]:
    """Read the finished rounds, and each pass of the loop.

    Raises:
        UserError: the folder is not of `opcd experience`.
    """
    if not run.is_dir():
        raise UserError(f"no folder {run.absolute()}{beside(run)}")
    if not (run / IDENTITY).exists():
        raise UserError(f"{run.resolve()} is no run of `opcd experience`: it has no {IDENTITY}")
    numbered = [(int(found[1]), f) for f in run.glob("round-*") if (found := ROUND.fullmatch(f.name))]
    folders = [folder for _, folder in sorted(numbered) if (folder / ATTEMPTS).exists()]
    if not folders:
        alone = Part.read(run)
        read_object(run / IDENTITY, alone.problems)
        return [], [alone]
    parts = [Part.read(folder, folder.name.replace("-", " ")) for folder in folders]
    read_object(run / IDENTITY, parts[0].problems)
    return read_rounds(run, parts[0].problems), parts


def print_run(run: Path, console: Console | None = None) -> None:
    """Print rounds, lessons, scores and attempts."""
    console = console or Screen(width=None if Screen().is_terminal else 140)
    rounds, parts = read_run(run)
    if rounds:
        console.print(_table(ROUND_HEADER, [round_cells(one) for one in rounds]))
    for part in parts:
        console.print(plain(f"{part.name}: {part.title}" if part.name else part.title), highlight=False)
        for lesson, seen in part.lessons:
            console.print(plain(f"  - {lesson}" + (f" (written {seen} times)" if seen > 1 else "")), highlight=False)
        if part.context and not part.lessons:  # the lists were not kept
            console.print(plain(part.context), highlight=False)
        if part.scores:
            console.print(
                _table(SCORE_HEADER, [score_cells(score) for score in (*part.without, *best_of_each(part.scores))])
            )
        for problem in part.problems[:LISTED]:
            console.print(plain(f"  {problem}"), highlight=False)
    if parts[-1].examples:
        first = parts[-1].examples[0]
        console.print(plain(f"an attempt:\n{first['transcript']}"), highlight=False)
        console.print(plain(f"what was extracted from it:\n{first['extracted'] or 'nothing yet'}"), highlight=False)


def make_page(run: Path) -> str:
    """Make one HTML page of a run, which needs no network."""
    rounds, parts = read_run(run)
    return render(
        Path(__file__).parent / "show.html.j2",
        title=f"Experience: {run.resolve().name}",
        round_header=ROUND_HEADER,
        rounds=[round_cells(one) for one in rounds],
        parts=[
            {"part": part, "plot": _plot(part, f"{run.name}{number}"), "scores": [score_cells(s) for s in part.scores]}
            for number, part in enumerate(parts)
        ],
        score_header=SCORE_HEADER,
        run=json.dumps(read_object(run / IDENTITY, []), indent=1, ensure_ascii=False),
    )


ROUND_HEADER = (
    *("round", "student before", "without list", "with list"),
    *("lessons", "tokens", "divergence", "student after"),
)
SCORE_HEADER = ("list", "step", "lessons", "tokens", "right", "success (95 % interval)")


def round_cells(one: Round) -> tuple[str, ...]:
    """A row of the table of rounds, with shares of the validation items."""
    shares = [f"{share:.3f}" for share in (one.student_before, one.without, one.selected)]
    divergence = "" if one.divergence is None else f"{one.divergence:.4f}"
    return (str(one.round), *shares, str(one.lessons), str(one.tokens), divergence, f"{one.student_after:.3f}")


def score_cells(score: Score) -> tuple[str, ...]:
    """A row of the table of scores."""
    place = ("none", "") if score.number is None else (str(score.number), str(score.step))
    share = _share(score.success, score.low, score.high)
    return (*place, str(score.lessons), str(score.tokens), f"{score.right} of {score.items}", share)


def _share(success: float, low: float, high: float) -> str:
    return f"{success:.3f}, {low:.3f} to {high:.3f}"


def _plot(part: Part, seed: str) -> Markup | None:
    """Plot success over the steps of each list. None without scores or matplotlib."""
    if not part.scores:
        return None
    number = attrgetter("number")
    scores = sorted((score for score in part.scores if score.number is not None), key=number)
    by_list = itertools.groupby(scores, key=number)
    groups = {f"list {one}": [[(score.step or 0, score.success) for score in group]] for one, group in by_list}

    def draw(axes: "Axes") -> None:
        """Draw the curves and the baseline."""
        curves(axes, groups)
        for score in part.without:
            axes.axhline(score.success, color="black", linestyle="--", linewidth=1, label="without lessons")

    try:
        return Markup(drawn(draw, "Success with the list as it grew", "training items learnt from", "share", seed))
    except UserError:
        return None


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(*header)
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def _is_score(row: dict[str, Any]) -> bool:
    """Whether a score is over at least one item. The score without a list has neither number, step nor id."""
    return row["items"] > 0 and len({row[name] is None for name in ("number", "step", "id")}) == 1


def _is_list(row: dict[str, Any]) -> bool:
    """Whether a list has texts as lessons, and a count for each."""
    texts, counts = (isinstance(x, str) for x in row["lessons"]), (isinstance(x, int) for x in row["seen"])
    return len(row["lessons"]) == len(row["seen"]) and all(texts) and all(counts)


def _lines(file: Path) -> int:
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        return sum(line.endswith(b"\n") for line in stream)
