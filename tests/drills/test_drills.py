"""Short forms of the drills: python -m benchmarks.drills NAME."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.drills import terminal
from benchmarks.drills.hostile import hostile
from benchmarks.drills.inputs import fuzz, inputs
from benchmarks.drills.smuggling import smuggling
from opcd.data import example as examples
from opcd.data.chat_template import TextEncoder
from opcd.runtime import output
from opcd.runtime.files import user_files as files


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "runs"),
    [("saves damage", 8), ("killed", 1), ("signals", 2), ("numbers", 3), ("folder requeue secrets", 1), ("beside", 2)],
)
def test_a_drill(names, runs):
    drill(*names.split(), runs=runs)


@pytest.mark.slow
@pytest.mark.case("E2")
def test_a_signal_within_an_evaluation():
    drill("evaluations", runs=3)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="a small disk of its own is mounted by root only")
def test_a_full_disk():
    drill("disk", runs=2)


def test_malformed_rows(tmp_path):
    outcome = inputs(1, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 60


def test_rows_changed_at_random(tmp_path):
    outcome = fuzz(300, tmp_path)
    assert outcome.problems == [] and outcome.tried == 300


@pytest.mark.case("A1", "A4", "A5", "A9", "A10", "B7")
def test_folders_that_somebody_else_made(tmp_path):
    outcome = hostile(4, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 150


def test_control_tokens_in_rows_and_contexts(tmp_path):
    outcome = smuggling(10, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 1000


@pytest.mark.slow
@pytest.mark.case("A7")
def test_a_terminal_stays_clean(tmp_path):
    outcome = terminal.terminal(1, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 30


@pytest.mark.case("A7")
def test_a_terminal_stays_clean_where_nothing_is_trained(tmp_path, monkeypatch):
    cases, begin = (
        terminal._cases,
        ("a query, its reference, an answer", "the name of a file of rows", "a server's words"),
    )
    short = lambda *given: (case for case in cases(*given) if case.place not in begin)  # noqa: E731
    monkeypatch.setattr(terminal, "_cases", short)
    outcome = terminal.terminal(1, tmp_path)
    assert outcome.problems == [] and outcome.tried >= 24


@pytest.mark.case("A7")
def test_the_drill_of_a_terminal_sees_what_is_not_cleaned(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "shown", lambda text, lines=True: str(text))
    monkeypatch.setattr(terminal, "_cases", lambda where, text, address: [terminal.Case("a command", [text], 2)])
    outcome = terminal.terminal(1, tmp_path)
    assert outcome.survived == 0 and outcome.tried == 2


@pytest.mark.parametrize(
    ("drill", "owner", "name", "instead"),
    [
        (smuggling, TextEncoder, "holds_control", lambda encoder, text: False),
        (inputs, examples, "check_text", lambda text, where: None),
        (fuzz, files, "parse_json", lambda text, source: json.loads(text.replace("\\u0000", ""))),
    ],
)
def test_a_drill_fails_without_what_it_checks(drill, owner, name, instead, monkeypatch, tmp_path):
    monkeypatch.setattr(owner, name, instead)
    outcome = drill(1 if drill is inputs else 200, tmp_path)
    assert 0 < len(outcome.problems) == outcome.tried - outcome.survived


def drill(*names: str, runs: int) -> None:
    """Run drills in a process that forks its runs."""
    words = [sys.executable, "-m", "benchmarks.drills", *names, "--runs", str(runs)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
