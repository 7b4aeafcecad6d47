"""What the data tests share: the packaged tokenizer, and files of rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from opcd.data import Example


@pytest.fixture(scope="session")
def packaged_tokenizer() -> PreTrainedTokenizerBase:
    from opcd.models import ModelConfig, load_tokenizer

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
    from opcd.data import Example

    def make(query: object, context: str | None = None, index: int = 0) -> Example:
        return Example(query, context, None, None, index, f"rows.jsonl:{index + 1}")

    return make
