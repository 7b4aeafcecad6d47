"""Data that tests of training share."""

import pytest

from opcd.data import ContextQueryDataModule
from tests.helpers.rows import write_rows
from tests.helpers.training import RESPONSES


@pytest.fixture
def recorded(tmp_path, context):
    """Eight queries with responses of different lengths."""
    rows = [{"query": f"What is {n} + {n}?", "response": text} for n, text in enumerate(RESPONSES)]
    return ContextQueryDataModule(
        train=str(write_rows(tmp_path / "r.jsonl", rows)), context=str(context), shuffle=False
    )
