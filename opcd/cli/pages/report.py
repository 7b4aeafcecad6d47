"""`opcd report RUN ...`: one HTML page about a run, or several side by side, that needs no network.

opcd report runs/version_0
opcd report runs/version_0 runs/version_1 --out both.html
"""

import argparse
import sys
from pathlib import Path

import yaml
from markupsafe import Markup

from opcd.config.parsing import Parser
from opcd.results import run_tables as tables
from opcd.results.pages import render
from opcd.results.plots import plots
from opcd.results.run_tables import Run, read_runs
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import DiskError, write_atomic
from opcd.runtime.files.user_files import refuse_existing

LISTED = 50
"""Most problems of a run on the page."""


def main(args: list[str]) -> int:
    """Write the page. Returns 0.

    Raises:
        UserError: a folder is not of `opcd fit`.
    """
    options = make_parser().parse_args(args)
    refuse_existing(options.out, "--out")
    runs = read_runs(options.runs)
    text = page(runs)
    try:
        write_atomic(options.out, text)
    except DiskError as error:
        raise UserError(f"--out: {error}") from error
    for folder in options.runs:
        if folder not in [run.folder for run in runs]:
            print(f"{folder}: another of these runs resumed it, and shows it as its beginning")
    print(f"page: {options.out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder, such as runs/version_0")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="a new file; default: %(default)s")
    return parser


def page(runs: list[Run]) -> str:
    """Make the page; without matplotlib there is one message, and no curves."""
    try:
        drawn = {name: Markup(svg) for name, svg in plots(runs).items()}
    except UserError as error:
        drawn = {}
        print(f"opcd: the page has no curves: {error}", file=sys.stderr)
    evaluations = tables.evaluations(runs)
    for run in runs:
        for problem in run.problems[:LISTED]:
            print(f"opcd: {run.name}: {problem}", file=sys.stderr)
    return render(
        Path(__file__).parent / "report.html.j2",
        title=", ".join(run.name for run in runs),
        overview=tables.overview(runs),
        plots=drawn,
        questions=tables.questions(runs),
        evaluations=evaluations,
        numbers=tables.all_numbers(runs),
        several=len(runs) > 1,
        differences=tables.differences(runs),
        environments=tables.environments(runs),
        problems={run.name: run.problems[:LISTED] for run in runs if run.problems},
        commands={run.name: run.environment.get("command", tables.NONE) for run in runs},
        configs={run.name: yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True) for run in runs},
    )
