"""Mathematical problems with one answer, scored as in the task `dapo_math`."""

import hashlib
import json
from collections.abc import Sequence

from opcd.data import Example, read_examples
from opcd.data.example import Message
from opcd.experience.problems import Attempt, Problems, Writer
from opcd.runtime.extras import require
from opcd.tasks.dapo_math import process_results
from opcd.tasks.docs import question_docs
from opcd.writing.written import Written

KEY = "problems.init_args"


class MathProblems(Problems):
    """Mathematical problems. math-verify compares the text after the last "Answer:" with the reference.

    Rows are read as everywhere in opcd ({query, reference}, or the columns of DAPO-Math-17k). Duplicates count once. An
    item's id is a hash of its query. Training rows need no reference: lessons come from the attempt alone.

    Args:
        train: rows that lessons come from: a .jsonl, .json, .csv or .parquet file, or a hub data set org/name:split or
            org/name/config:split.
        val: rows to select a list by; none may be in `train`. Do not report results on rows of either.
        limit_train: use the first so many rows; null: all.
        limit_val: use the first so many rows; null: all.
    """

    def __init__(self, train: str, val: str, limit_train: int | None = None, limit_val: int | None = None) -> None:
        for name, limit in (("limit_train", limit_train), ("limit_val", limit_val)):
            if limit is not None and limit < 1:
                raise ValueError(f"{KEY}.{name} must be at least 1, got {limit}")
        require("evaluation", "math_verify", "MathProblems")
        self.sources = {"train": (train, limit_train), "val": (val, limit_val)}
        self._parts: dict[str, dict[str, Example]] = {}

    def training(self) -> Sequence[str]:
        """Ids of the training rows."""
        return list(self._part("train"))

    def validation(self) -> Sequence[str]:
        """Ids of the validation rows, each of which has a reference."""
        part = self._part("val")
        question_docs(part.values())
        return list(part)

    def attempt(self, items: Sequence[str], writer: Writer, context: str | None) -> list[Attempt]:
        """One answer to each problem."""
        known = self._part("train") | self._part("val")
        conversations = [_messages(known[item]) for item in items]
        answers = writer.write(conversations, context)
        return [_scored(item, known[item], answer) for item, answer in zip(items, answers, strict=True)]

    def _part(self, name: str) -> dict[str, Example]:
        if name not in self._parts:
            source, limit = self.sources[name]
            rows = read_examples(source, f"{KEY}.{name}")[:limit]
            self._parts[name] = {_id(row): row for row in rows}
        return self._parts[name]


def _messages(row: Example) -> list[Message]:
    return [{"role": "user", "content": row.query}] if isinstance(row.query, str) else row.query


def _id(row: Example) -> str:
    return hashlib.sha256(json.dumps(_messages(row), sort_keys=True).encode()).hexdigest()[:16]


def _scored(item: str, row: Example, answer: Written) -> Attempt:
    problem = "\n".join(message["content"] for message in _messages(row))
    end = "\n(The attempt ends here: it was too long.)" if answer.cut_off else ""
    success, outcome = None, None
    if row.reference is not None and row.reference.strip():
        scores = process_results({"reference": row.reference.strip()}, [answer.text])
        success = scores["accuracy"]
        wrong = "The final answer is wrong." if scores["answered"] else "It has no line of the form 'Answer: ...'."
        outcome = "The final answer is right." if success else wrong
    transcript = f"Problem:\n{problem}\n\nAttempt:\n{answer.text}{end}"
    return Attempt(item, transcript, outcome, success, answer.tokens, answer.cut_off)
