"""Sums as problems, and the loop with the scripted model in this process."""

from pathlib import Path

import pytest

from opcd.cli.experience import main
from tests.helpers.rows import sums, write_rows
from tests.helpers.scripted import ScriptedWriters


@pytest.fixture
def words(tmp_path) -> list[str]:
    """The words after `opcd experience`, less --out: two lists of four steps, in uneven batches."""
    train = write_rows(tmp_path / "train.jsonl", sums([1, 2, 3, 4, 5, 6]))
    val = write_rows(tmp_path / "val.jsonl", sums([10, 12, 14, 16, 11]))
    paths = ["--problems.init_args.train", str(train), "--problems.init_args.val", str(val)]
    batches = ["--solve.batch_size", "3", "--extract.batch_size", "3", "--select.batch_size", "2"]
    return ["--problems", "MathProblems", *paths, *batches, "--lists=2", "--steps=4", "--lessons.max_tokens=60"]


@pytest.fixture
def scripted(words, tmp_path, monkeypatch):
    """Run the loop with more words; returns its folder."""

    def run(*more: str, out: str = "out") -> Path:
        monkeypatch.setenv("SCRIPTED_CALLS", str(tmp_path / f"{out}-calls.txt"))
        assert main([*words, "--out", str(tmp_path / out), *more], ScriptedWriters) == 0
        return tmp_path / out

    return run
