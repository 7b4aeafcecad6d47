"""What the data tests share: the packaged tokenizer, and files of rows."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from opcd.data import Example
from opcd.models import ModelConfig, load_tokenizer


@pytest.fixture(scope="session")
def packaged_tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelConfig())


@pytest.fixture
def tokenizer(packaged_tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that a test may change."""
    return copy.deepcopy(packaged_tokenizer)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    def write(*rows: object, name: str = "rows.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def example() -> Callable[..., Example]:
    def make(query: object, context: str | None = None, index: int = 0) -> Example:
        return Example(query, context, None, None, index, f"rows.jsonl:{index + 1}")

    return make
