"""`opcd sweep SWEEP.yaml`: many runs of `opcd fit` from one file.

    opcd sweep SWEEP.yaml --jobs 2
    opcd sweep SWEEP.yaml --model.student.name FOLDER

Dotted options override the file's `base.set`. Every config is checked first. A finished arm does not run again, so the
same command continues after a stop.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from opcd.cli.fit import fit_parser
from opcd.config.parsing import Parser
from opcd.results.plots import bars, curves, drawn
from opcd.results.run_files import read_metrics
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.sweep.arm_checkpoints import keep_the_best
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.job_engine import Engine, explain, locked
from opcd.sweep.jobs import Job, fit_job
from opcd.sweep.launchers import LocalLauncher, SlurmLauncher
from opcd.sweep.summary import ArmResult, by_seed, write_summary
from opcd.sweep.sweep_plan import Arm, grid, read_sweep

INTERRUPTED = 130


def main(args: list[str]) -> int:
    """Run a sweep. Returns 0, or 1 if an arm failed.

    Raises:
        UserError: the file or an arm is wrong; nothing has started.
    """
    options, dotted = with_dotted(make_parser(), args)
    sweep = read_sweep(options.sweep)
    sweep.base.set |= dotted
    checker = ConfigChecker(fit_parser(), sweep.base)
    out = options.out or Path("sweeps") / options.sweep.stem
    arms = grid(sweep)
    for name, settings in sweep.arms.items():
        checker.check_keys(settings, f"arms.{name}")
    checker.check_keys(sweep.axes, "axes")
    configs = [checker.resolve(arm.settings, f"arm {arm.name}") for arm in arms]
    jobs = [
        fit_job(f"arms/{arm.name}", out, checker.words(arm.settings), config)
        for arm, config in zip(arms, configs, strict=True)
    ]
    if options.dry_run:
        print("\n".join(arm.name for arm in arms))
        return 0
    with locked(out) as lock:
        engine = engine_for(out, options.jobs, options.launcher, sweep.slurm, lock)
        return _run(arms, jobs, engine, out)


def engine_for(out: Path, jobs: int | None, launcher: str, slurm: list[str], lock: int) -> Engine:
    """An engine for the folder `out`. By default it runs one job at a time, on a cluster all at once."""
    if launcher == "slurm":
        return Engine(out, SlurmLauncher(slurm, lock), jobs or sys.maxsize)
    return Engine(out, LocalLauncher(jobs or 1, lock), jobs or 1)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands that run an engine."""
    parser.add_argument("--jobs", type=_count, help="most runs at the same time; default: 1, on a cluster all")
    parser.add_argument("--out", type=Path, help="folder for all output; with the same folder a sweep continues")
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local", help="this machine, or SLURM")


def with_dotted(parser: argparse.ArgumentParser, args: list[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """Parse the parser's options, and dotted ones (--data.train FILE) as config key -> value."""
    options, rest = parser.parse_known_args(args)
    dotted: dict[str, object] = {}
    for key, value in zip(rest[::2], [*rest[1::2], None][: len(rest[::2])], strict=True):
        if not key.startswith("--") or "." not in key or value is None:
            own = [option[2:] for action in parser._actions for option in action.option_strings]
            meant = did_you_mean(key.removeprefix("--"), own)
            parser.error(f"{key}: neither an option nor a dotted config key with a value (--data.train FILE){meant}")
        dotted[key[2:]] = load_yaml(value, key)
    return options, dotted


def make_parser() -> argparse.ArgumentParser:
    """The command's own options; dotted options are config keys."""
    parser = Parser(prog="opcd sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path, metavar="SWEEP.yaml", help="base, axes, arms (docs/evaluation.md)")
    add_engine_options(parser)
    parser.add_argument("--dry_run", action="store_true", help="check every arm, print the names, run nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, not {text!r}")
    return int(text)


def _run(arms: Sequence[Arm], jobs: Sequence[Job], engine: Engine, out: Path) -> int:
    """Run the job of each arm; returns the exit code."""

    def results() -> list[ArmResult]:
        """The present result of each arm."""
        return [ArmResult.of(arm, engine.tasks[job.name]) for arm, job in zip(arms, jobs, strict=True)]

    engine.add(jobs)
    engine.on_finish = lambda: keep_the_best(results())
    try:
        engine.run()
    except KeyboardInterrupt:
        print(f"stopped; finished work is in {out}, and the same command continues there")
        return INTERRUPTED
    finally:
        write_summary(out, results())
        print(f"summary: {out / 'summary.md'}, {out / 'summary.csv'}")
        try:
            _plot(out, results())
        except UserError as error:
            print(f"no plots: {error}")
    failed = engine.failed()
    if failed:
        print(f"{len(failed)} of {len(arms)} arms failed; the same command tries them again\n{explain(failed)}")
    return 1 if failed else 0


def _plot(out: Path, results: Sequence[ArmResult]) -> None:
    """Write plots of divergences over the steps, and of each arm's last value, with seeds together."""
    groups = by_seed([result for result in results if result.numbers])
    for metric, unit in (
        ("train/divergence", "nats a token"),
        ("val/divergence", "nats a token"),
        ("samples/right", "share"),
    ):
        series = {
            name: [read_metrics(r.task.folder.run).get(metric, []) for r in group] for name, group in groups.items()
        }
        last = {name: [r.numbers[metric] for r in group if metric in r.numbers] for name, group in groups.items()}
        last = {name: values for name, values in last.items() if values}
        file = metric.replace("/", "_")
        (out / "plots").mkdir(exist_ok=True)
        if any(curve for group in series.values() for curve in group):
            text = drawn(lambda axes, c=series: curves(axes, c), f"{metric} over steps", "step", unit)  # type: ignore[misc]
            write_atomic(out / "plots" / f"{file}_steps.svg", text)
        if last:
            text = drawn(lambda axes, b=last: bars(axes, b), f"{metric} at the end", unit, "")  # type: ignore[misc]
            write_atomic(out / "plots" / f"{file}.svg", text)
