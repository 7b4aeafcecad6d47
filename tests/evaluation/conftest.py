"""Files of rows of our own for the tasks."""

from pathlib import Path

import pytest

from tests.helpers.rows import write_rows
from tests.helpers.task_rows import ifeval_rows, math_rows


@pytest.fixture
def math_file(tmp_path) -> Path:
    """Four sums."""
    return write_rows(tmp_path / "math.jsonl", math_rows())


@pytest.fixture
def ifeval_file(tmp_path) -> Path:
    """Four prompts, five instructions."""
    return write_rows(tmp_path / "ifeval.jsonl", ifeval_rows())
