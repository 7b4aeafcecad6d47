"""All drills, or some by name: python -m benchmarks.drills [NAME ...] [--runs N] [--folder FOLDER]

Prints a table (drill, tried, survived) and exits with 1 if one fails.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

# The drills fork; threads do not survive that, and the models are too small for them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"

from rich.console import Console
from rich.table import Table

from benchmarks.drills.beside import beside, folder, secrets
from benchmarks.drills.fits import Outcome
from benchmarks.drills.hostile import hostile
from benchmarks.drills.inputs import fuzz, inputs
from benchmarks.drills.killed import killed
from benchmarks.drills.numbers import numbers
from benchmarks.drills.saves import damage, disk, saves
from benchmarks.drills.signals import evaluations, requeue, signals
from benchmarks.drills.smuggling import smuggling
from benchmarks.drills.terminal import terminal

DRILLS = {
    "killed": (killed, 20, "kill -9 within a step, twice in one epoch, resume: bit-equal"),
    "saves": (saves, 50, "kill -9 at a point of a save: the newest or the one before can be loaded"),
    "disk": (disk, 8, "disk full before or in a save: nothing lost, exit 2 or going on as configured"),
    "damage": (damage, 100, "a bit flipped, a file cut, of checkpoint or manifest: found, the one before taken"),
    "numbers": (numbers, 18, "NaN and infinities in loss, teacher, gradients: no step, weights unchanged"),
    "signals": (signals, 12, "TERM, INT, USR1 in rollout, teacher, backward, save: exit 143/130, saved within 10 s"),
    "evaluations": (evaluations, 9, "TERM, INT in LMEval and in a validation: saved, made up for, bit-equal"),
    "requeue": (requeue, 2, "USR1 under SLURM: saved, then requeued, goes on by itself: bit-equal"),
    "folder": (folder, 6, "two runs go on from one folder: the second refuses, naming the first"),
    "beside": (beside, 3, "validation, samples, loggers, progress bar on or off: bit-equal training"),
    "secrets": (secrets, 2, "tokens planted in the environment: in nothing that a run writes or prints"),
    "smuggling": (smuggling, 200, "control tokens spelled in rows and contexts, five tokenizers: plain text"),
    "terminal": (
        terminal,
        2,
        "escape sequences in answers, names, files, a server's words: shown escaped by each command",
    ),
    "hostile": (hostile, 100, "folders of models, adapters and runs, GGUF files: no code runs, no traceback, an end"),
    "inputs": (inputs, 1, "malformed files of rows: file, line and field, or skipped and counted"),
    "fuzz": (fuzz, 10_000, "files made or changed at random: read or refused, no row lost in silence"),
}


def main() -> int:
    """Run the drills that the command line names. Returns 1 if one fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.drills", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(DRILLS)} (default: all)")
    parser.add_argument("--runs", type=int, help="tries of each drill (default: its own number)")
    parser.add_argument("--folder", type=Path, help="where to work, and to leave what was written")
    args = parser.parse_args()
    if unknown := set(args.names) - set(DRILLS):
        parser.error(f"no drill {', '.join(sorted(unknown))}; there are {', '.join(DRILLS)}")
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = {}
        for name in args.names or DRILLS:
            drill, runs, _ = DRILLS[name]
            begun = time.monotonic()
            outcome = drill(args.runs or runs, (args.folder or Path(scratch)) / name)
            outcomes[name] = (outcome, time.monotonic() - begun)
            print(f"{name}: {outcome.survived} of {outcome.tried}", file=sys.stderr, flush=True)
    return _report(outcomes)


def _report(outcomes: dict[str, tuple[Outcome, float]]) -> int:
    table = Table("drill", "what is done", "tried", "survived", "seconds")
    for name, (outcome, seconds) in outcomes.items():
        table.add_row(name, DRILLS[name][2], str(outcome.tried), str(outcome.survived), f"{seconds:.0f}")
        for problem in outcome.problems:
            print(f"{name}: {problem}", file=sys.stderr)
    Console(width=120).print(table)
    return int(any(not outcome.tried or outcome.survived < outcome.tried for outcome, _ in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
