"""Rows and a metric of the tasks in this folder; their YAML names both with `!function`."""

from pathlib import Path
from typing import Any

from datasets import Dataset

from opcd.runtime.files.user_files import read_jsonl


def harbour(**_: Any) -> dict[str, Dataset]:
    """The rows of the file beside this one, as the split that the YAML names."""
    file = Path(__file__).parent / "harbour.jsonl"
    return {"test": Dataset.from_list([row for _, row in read_jsonl(file, "harbour")])}


def first_letter(references: list[str], predictions: list[str], **_: Any) -> float:
    """Whether an answer begins as the right one."""
    return float(predictions[0].strip()[:1].lower() == references[0][:1].lower())
