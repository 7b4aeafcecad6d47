"""The paper's system-prompt experiments: medical questions and safety, with answers in <answer> tags.

The data sets (`ytz20/sys_medmcqa_*`, `ytz20/sys_safety_*`) were not available to this project. According to the paper's
code (microsoft/LMOps, opcd/), a row has `content` (chat messages, or text) and `answer` (a letter A to D; yes or no).
This module assumes that the prompt has no other parts, and that the row asks for the tags if the system prompt does
not. Rows of this project's own form ({"query", "reference"}) are read as well.

The last tags count, as in the paper's code. One thing differs: that code takes the first letter from A to D anywhere in
the tags, so that "The answer is B" reads as A (of "answer"). Here the letter must stand alone.
"""

import re
from collections.abc import Iterator
from typing import Any

from opcd.data import Example, parse_row, read_rows
from opcd.runtime.errors import UserError
from opcd.tasks.docs import question_docs

OPENING, CLOSING = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
LETTER = re.compile(r"\(([A-Da-d])\)|(?<![A-Za-z])([A-D])(?![A-Za-z'])|^\s*([a-d])\s*(?:[.):]\s*)?$")


TAGGED = 'a row is {{"content", "answer"}} (the answer: {answer}), or {{"query", "reference"}}'
"""The row format of these tasks, for messages."""


def medmcqa(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """The rows of a file or a hub data set whose answers are letters."""
    accepted = TAGGED.format(answer="A to D")
    return question_docs(_examples(source, key, accepted), _as_letter, accepted)


def safety(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """The rows of a file or a hub data set whose answers are yes or no."""
    accepted = TAGGED.format(answer="yes or no")
    return question_docs(_examples(source, key, accepted), _as_yes_no, accepted)


def letter_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the letter is right, and whether there is one in tags."""
    return _results(doc, tagged_letter(results[0]))


def yes_no_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether yes or no is right, and whether one of them is in tags."""
    return _results(doc, tagged_yes_no(results[0]))


def tagged_letter(response: str) -> str | None:
    """The option in the last tags: "(B)", else the first letter from A to D that stands alone; in upper case."""
    found = LETTER.search(_tagged(response))
    return next(group for group in found.groups() if group).upper() if found else None


def tagged_yes_no(response: str) -> str | None:
    """The text in the last tags if it is yes or no, in lower case."""
    return _as_yes_no(_tagged(response))


def _results(doc: dict[str, Any], answer: str | None) -> dict[str, bool]:
    return {"accuracy": answer == doc["reference"], "answered": answer is not None}


def _tagged(response: str) -> str:
    """The text in the last tags, in linear time. If several tags open before one closes, the first one counts."""
    inside, place = "", 0
    while (opening := OPENING.search(response, place)) and (closing := CLOSING.search(response, opening.end())):
        inside, place = response[opening.end() : closing.start()], closing.end()
    return inside


def _as_letter(reference: str) -> str | None:
    return reference.upper() if reference.upper() in ("A", "B", "C", "D") else None


def _as_yes_no(text: str) -> str | None:
    word = text.strip().lower()
    return word if word in ("yes", "no") else None


def _examples(source: str, key: str, accepted: str) -> Iterator[Example]:
    number = -1
    for number, (where, row) in enumerate(read_rows(source, key)):
        yield parse_row(row, where, number, accepted)
    if number < 0:
        raise UserError(f"{key}: {source} has no rows")
