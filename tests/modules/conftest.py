"""Data that tests of training share."""

import pytest

from tests.helpers.rows import write_rows


@pytest.fixture
def recorded(tmp_path, context, tiny):
    """Eight queries with responses of different lengths."""
    from opcd.data import ContextQueryDataModule
    from opcd.models import ModelConfig
    from tests.helpers.training import RESPONSES

    rows = [{"query": f"What is {n} + {n}?", "response": text} for n, text in enumerate(RESPONSES)]
    file = write_rows(tmp_path / "r.jsonl", rows)
    return ContextQueryDataModule(train=str(file), context=str(context), shuffle=False, student=ModelConfig(name=tiny))
