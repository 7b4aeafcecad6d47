"""The paper's comparison from one config: a table, plots, and a report page.

    python benchmarks/run.py benchmarks/configs/quick.yaml
    python benchmarks/run.py benchmarks/configs/cross_size.yaml --student FOLDER --teacher FOLDER --data.train FILE

Arms are `opcd fit` processes, followed by `opcd evaluate` processes, on the engine of `opcd sweep`. Finished jobs are
not run again, so the same command resumes. Dotted options (--data.train FILE) override the config's `base.set`. The
arms are defined in comparison/arms.py.
"""

import argparse
import shlex
import sys
from pathlib import Path

from comparison.arms import Benchmark, Plan
from comparison.figures import figures
from comparison.report import report
from comparison.results import collect, write_tables
from jsonargparse import ArgumentError

from opcd.cli.fit import fit_parser
from opcd.cli.sweep import INTERRUPTED, add_engine_options, engine_for, with_dotted
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.job_engine import explain, locked
from opcd.sweep.sweep_plan import parse_yaml


def main(args: list[str]) -> int:
    """Run a benchmark. Returns 0, or 1 if a job failed, or 2 for a user error."""
    options, dotted = read_options(args)
    try:
        return run(options, dotted, args)
    except (UserError, ArgumentError) as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 2


def read_options(args: list[str]) -> tuple[argparse.Namespace, dict[str, object]]:
    """The options, and the dotted options as key -> value."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, metavar="CONFIG", help="a file like those in benchmarks/configs")
    parser.add_argument("--student", help="model.student.name: a folder, a hub id, or smollm2-135m")
    parser.add_argument("--teacher", help="the teacher's name; default: the student's own weights, frozen")
    parser.add_argument("--task_data", help="task.data: the test rows")
    parser.add_argument("--forgetting_data", help="forgetting.data: rows of the second task")
    add_engine_options(parser)
    return with_dotted(parser, args)


def run(options: argparse.Namespace, dotted: dict[str, object], args: list[str]) -> int:
    """Check everything, run the missing jobs, and write tables, plots and the page."""
    benchmark: Benchmark = parse_yaml(options.config, Benchmark, "config")
    benchmark.apply(options.student, options.teacher, options.task_data, options.forgetting_data, dotted)
    out = options.out or Path("benchmarks/results") / options.config.stem
    checker = ConfigChecker(fit_parser(), benchmark.base)
    plan = Plan(benchmark, checker, out)
    with locked(out) as lock:
        engine = engine_for(out, options.jobs, options.launcher, benchmark.slurm, lock)
        engine.add(plan.jobs())
        try:
            engine.run()
        except KeyboardInterrupt:
            print(f"stopped; finished jobs are in {out}, and the same command resumes")
            return INTERRUPTED
        outcome = collect(plan, engine)
        command = shlex.join(["python", "benchmarks/run.py", *args])
        print(write_tables(out, outcome))
        write_atomic(out / "report.html", report(outcome, figures(outcome), command))
    print(f"table, CSV and JSON: {out}/table.*   page: {out / 'report.html'}")
    if failed := engine.failed():
        print(f"{len(failed)} jobs failed; the same command tries them again\n{explain(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
