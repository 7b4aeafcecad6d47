"""Short forms of the drills: python -m benchmarks.drills NAME."""

import os
import subprocess
import sys

import pytest

from benchmarks.drills.inputs import fuzz, inputs


@pytest.mark.parametrize(
    ("names", "runs"),
    [("saves damage", 8), ("killed", 1), ("signals", 2), ("numbers", 3), ("folder requeue secrets", 1), ("beside", 2)],
)
def test_a_drill(names, runs):
    drill(*names.split(), runs=runs)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own is mounted by root only")
def test_a_full_disk():
    drill("disk", runs=2)


def test_malformed_rows(tmp_path):
    outcome = inputs(1, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 60


def test_rows_changed_at_random(tmp_path):
    outcome = fuzz(300, tmp_path)
    assert outcome.problems == [] and outcome.tried == 300


def drill(*names: str, runs: int) -> None:
    """Run drills in a process that forks its runs."""
    words = [sys.executable, "-m", "benchmarks.drills", *names, "--runs", str(runs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
