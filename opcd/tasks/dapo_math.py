"""Mathematical problems in the format of DAPO-Math-17k: the answer follows the last "Answer:"."""

import re
import threading
from typing import Any

from opcd.data import read_examples
from opcd.tasks.docs import QUESTIONS, question_docs

# As in the data set's own scorer (verl's math_dapo.py): any case, up to the end of the line; the last match counts.
ANSWER = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")
LONGEST = 1000
"""Characters of an answer. math-verify takes 5 seconds to give up on a longer, nested one."""


def dataset(source: str, key: str = "source", **_: Any) -> dict[str, Any]:
    """The rows of a file or a hub data set, without copies of a problem."""
    return question_docs(read_examples(source, key, accepted=QUESTIONS))


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Whether the answer equals the reference, and whether there is an answer in the requested form."""
    answer = final_answer(results[0])
    return {"accuracy": answer is not None and equal(doc["reference"], answer), "answered": answer is not None}


def final_answer(response: str) -> str | None:
    """The text after the last "Answer:" without Markdown emphasis, or None if there is no such text."""
    found = ANSWER.findall(response)
    answer = found[-1].strip(" \t*") if found else ""
    return answer or None


def equal(reference: str, answer: str) -> bool:
    """Whether math-verify finds the two equal, with the answer read as text or as LaTeX."""
    from math_verify import parse, verify

    if len(answer) > LONGEST:
        return False
    # The time limit is an alarm signal, which works in the main thread only.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    gold = parse(f"${reference}$", parsing_timeout=seconds)
    readings = (answer,) if "$" in answer or "\\boxed" in answer else (answer, f"${answer}$")
    return any(verify(gold, parse(reading, parsing_timeout=seconds), timeout_seconds=seconds) for reading in readings)
