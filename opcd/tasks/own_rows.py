"""The tasks for a user's own rows: `contains`, `exact` and `choice`."""

from typing import Any

from opcd.data import Example, parse_row, read_examples, read_rows
from opcd.runtime.errors import UserError
from opcd.tasks.docs import QUESTIONS, question_docs
from opcd.tasks.matching import holds

CHOICES = 'a row is {"query", "choices", "reference"}: two or more texts, and the right one of them'
"""The row format of `choice`, for messages."""


def questions(source: str = "", key: str = "source", **_: Any) -> dict[str, Any]:
    """The rows of a file or a hub data set, each with a reference. UserError for a wrong row, or without a source."""
    return question_docs(read_examples(_given(source, key), key, accepted=QUESTIONS))


def choices(source: str = "", key: str = "source", **_: Any) -> dict[str, Any]:
    """Rows with choices; `target` is the index of the right one. UserError for a wrong row, or without a source."""
    examples: list[Example] = []
    texts: dict[str, list[str]] = {}
    for number, (where, row) in enumerate(read_rows(_given(source, key), key)):
        examples.append(parse_row(row, where, number, CHOICES))
        texts[where] = _choices(row, where)
    if not examples:
        raise UserError(f"{key}: {source} has no rows")
    from datasets import Dataset

    docs = question_docs(examples, accepted=CHOICES)["test"].to_list()
    for doc in docs:
        doc["choices"] = texts[doc["source"]]
        if doc["reference"] not in doc["choices"]:
            raise UserError(f"{doc['source']}: the reference {doc['reference']!r} is none of the choices")
        doc["target"] = doc["choices"].index(doc["reference"])
    return {"test": Dataset.from_list(docs)}


def contains_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the answer contains the reference as separate words or numbers."""
    return {"accuracy": holds(results[0], doc["reference"])}


def exact_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the answer equals the reference, up to the amount of white space."""
    return {"accuracy": results[0].split() == doc["reference"].split()}


def _choices(row: Any, where: str) -> list[str]:
    found = row.get("choices")
    if not isinstance(found, list) or not all(isinstance(text, str) and text.strip() for text in found):
        raise UserError(f"{where}: choices must be a list of texts: {CHOICES}")
    texts = [text.strip() for text in found]
    if len(set(texts)) < max(2, len(texts)):
        raise UserError(f"{where}: choices must be two or more, each once: {CHOICES}")
    return texts


def _given(source: str, key: str) -> str:
    if not source:
        raise UserError(f"{key} is not set: name a file or a hub data set with your rows")
    return source
