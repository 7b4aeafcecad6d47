"""What all tests share: no hub, the packaged model, a tiny model of random weights, rows and contexts."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # LightningCLI calls what jsonargparse has deprecated

import pytest

import opcd as _opcd  # noqa: F401  before torch, which fixtures import: it sets how threads wait
from tests.helpers.rows import CONTEXT, ROWS, write_rows


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """Folder of a tiny model."""
    from benchmarks.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory) -> str:
    """Folder of another tiny model, of another width."""
    from benchmarks.tiny import make_tiny

    return str(make_tiny(tmp_path_factory.mktemp("models") / "teacher", hidden=48, seed=1))


@pytest.fixture
def rows(tmp_path) -> Path:
    """A JSONL file of eight queries."""
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def context(tmp_path) -> Path:
    """A text file with a context."""
    file = tmp_path / "context.txt"
    file.write_text(CONTEXT)
    return file


@pytest.fixture
def batch(rows, context, tiny):
    """All eight queries as one batch of both views."""
    from opcd.data import ContextQueryDataModule
    from opcd.models import ModelConfig

    data = ContextQueryDataModule(train=str(rows), context=str(context), student=ModelConfig(name=tiny))
    data.setup("fit")
    return data.encode(data.examples("train"))


@pytest.fixture
def opcd(monkeypatch, capsys):
    """Run the command in this process; returns the exit code and what it printed."""
    from opcd.cli.main import main

    def run(*args: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["opcd"])
        code = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run
