"""Rows and contexts that many tests take, and how they are written."""

import json
from pathlib import Path

ROWS = [{"query": f"What is {n} + {n}?", "reference": 2 * n} for n in range(8)]
CONTEXT = "Answer in one word. The harbour master of Quillhaven is called Odalys."
LESSONS = "Open one door after the other."


def write_rows(file: Path, rows: list[dict]) -> Path:
    """Write rows as JSONL; returns the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def read_rows(file: Path) -> list[dict]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def sums(numbers: list[int]) -> list[dict]:
    """A problem a number."""
    return [{"query": f"What is {n} + {n}?", "reference": str(2 * n)} for n in numbers]
