"""Examples as the rows of an lm-eval task."""

from collections.abc import Callable, Iterable
from typing import Any

from opcd.data import Example
from opcd.runtime.errors import UserError

QUESTIONS = 'a row is {"query", "reference"} or {"prompt", "reward_model": {"ground_truth"}} (DAPO-Math-17k)'
"""The row format of tasks whose questions have one answer, for messages."""


def question_docs(
    examples: Iterable[Example], check: Callable[[str], str | None] = str, accepted: str = QUESTIONS
) -> dict[str, Any]:
    """The split `test`: query, system (the row's system message, or ""), reference and source of each row.

    Args:
        examples: the rows.
        check: returns a reference in the form that the task compares, or None for an unknown one; default: unchanged.
        accepted: the row format, for messages.

    Raises:
        UserError: a row has no answer, a wrong one, or more than one user message.
    """
    from datasets import Dataset

    docs = []
    for example in examples:
        reference = example.reference.strip() if example.reference else ""
        if not reference:
            raise UserError(f"{example.source}: no answer to compare with: {accepted}; add it, or remove the row")
        known = check(reference)
        if known is None:
            raise UserError(f"{example.source}: {reference!r} is no answer that this task knows")
        system, query = _system_and_query(example)
        docs.append({"system": system, "query": query, "reference": known, "source": example.source})
    return {"test": Dataset.from_list(docs)}


def _system_and_query(example: Example) -> tuple[str, str]:
    if isinstance(example.query, str):
        return "", example.query
    *before, last = example.query
    if not before:
        return "", last["content"]
    if len(before) == 1 and before[0]["role"] == "system":
        return before[0]["content"], last["content"]
    raise UserError(f"{example.source}: a question is one message of the user's, and may have a system message first")
