"""The system-prompt experiments of the paper: answers in <answer> tags, medical questions and safety.

The data sets (`ytz20/sys_medmcqa_*`, `ytz20/sys_safety_*`) could not be looked at here. From the paper's code
(microsoft/LMOps, opcd/) a row is taken to hold `content` (chat messages, or text) and `answer` (a letter A to D; yes or
no). What is assumed: there is nothing else to the prompt, and the row itself asks for the tags where the system prompt
does not. Rows of the project's own shape ({"query", "reference"}) are read as well.

The last tags count, as there. One thing differs: that code takes the first letter from A to D anywhere inside the tags,
so that "The answer is B" reads as A (of "answer"); here it must stand alone.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from opcd.data import Example, parse_row, read_rows
from opcd.runtime.errors import UserError
from opcd.tasks.docs import question_docs

OPENING, CLOSING = re.compile("<answer>", re.IGNORECASE), re.compile("</answer>", re.IGNORECASE)
LETTER = re.compile(r"\(([A-Da-d])\)|(?<![A-Za-z])([A-D])(?![A-Za-z'])|^\s*([a-d])\s*(?:[.):]\s*)?$")


TAGGED = 'a row is {{"content", "answer"}} (the answer: {answer}), or {{"query", "reference"}}'
"""The rows of these tasks, for messages."""


def medmcqa(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """Rows whose answer is a letter."""
    accepted = TAGGED.format(answer="A to D")
    return question_docs(_examples(source, key, accepted), _as_letter, accepted)


def safety(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """Rows whose answer is yes or no."""
    accepted = TAGGED.format(answer="yes or no")
    return question_docs(_examples(source, key, accepted), _as_yes_no, accepted)


def letter_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the letter is right, and whether there is one in tags."""
    return _results(doc, results, tagged_letter)


def yes_no_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether yes or no is right, and whether one of them stands in tags."""
    return _results(doc, results, tagged_yes_no)


def tagged_letter(response: str) -> str | None:
    """The option in the last tags: "(B)", else the first letter from A to D that stands alone; in upper case."""
    found = LETTER.search(_tagged(response))
    return next(group for group in found.groups() if group).upper() if found else None


def tagged_yes_no(response: str) -> str | None:
    """What stands in the last tags, where it is yes or no."""
    return _as_yes_no(_tagged(response))


def _results(doc: dict[str, Any], results: list[str], read: Callable[[str], str | None]) -> dict[str, bool]:
    answer = read(results[0])
    return {"accuracy": answer == doc["reference"], "answered": answer is not None}


def _tagged(response: str) -> str:
    """What stands in the last tags; of several that open, the first one counts. Each tag is looked for once."""
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
