"""The rule for a right answer: it contains the reference as separate words or numbers.

The table of `opcd fit`, reports, sweeps, benchmarks and the task `contains` use this rule.
"""

import re
from functools import lru_cache
from typing import Any

MONTHS = (
    "january|february|march|april|may|june|july|august|september|october|november|december|"
    "jan|feb|mar|apr|jun|jul|aug|sept|sep|oct|nov|dec"
)
BEFORE = re.compile(r"(\w|\w[-\u2011\u2013/]|\d[.,:])\Z")
"""Text before a match that makes the match a part of something longer: twenty-one, 10/5, 2.5, 1,005, 5:30."""
AFTER = re.compile(r"\w|[-\u2011\u2013/]\w|['\u2019](?!s\b)\w|[.,:]\d")
"""Text after a match that does so; "Martha's" contains Martha."""
NUMBER = re.compile(r"\d[\d.,:]*")
NUMBER_BEFORE = re.compile(r"[-\u2212\u2013]\Z|\d[ \u00a0\u202f]\Z")
"""Text before a number that makes it a part of another number: -5, 10 000."""
NUMBER_AFTER = re.compile(
    r"[ \u00a0\u202f]\d{3}(?!\d)|\s+(hundred|thousand|million|billion|trillion|dozen)\b", re.IGNORECASE
)
DAY = re.compile(r"\d{1,2}")
DAY_BEFORE = re.compile(rf"\b({MONTHS})\.?\s+\Z", re.IGNORECASE)
"""Text before a number of up to two digits that makes it a day: May 1. The 1908 of "May 1908" is a year."""
DAY_AFTER = re.compile(rf"\s+(of\s+)?({MONTHS})\b", re.IGNORECASE)
NEAR = 16
"""Characters before and after a match that are checked; the longest month is shorter."""


def right(row: dict[str, Any]) -> bool:
    """Whether a row's `answer` contains its `reference`; False without a reference."""
    return row["reference"] is not None and holds(row["answer"], row["reference"])


def holds(answer: str, reference: str) -> bool:
    """Whether the answer contains the reference, in any case and with any white space, but not inside something longer.

    The reference 5 is not in 50, 5:30, 1,005 or -5, and 1 is not in "1 May", while "1 May" is.
    """
    words = reference.split()
    if not words:
        return False
    number, day = (kind.fullmatch("".join(words)) is not None for kind in (NUMBER, DAY))
    for found in _pattern(tuple(words)).finditer(answer):
        before, after = answer[max(0, found.start() - NEAR) : found.start()], answer[found.end() : found.end() + NEAR]
        if BEFORE.search(before) or AFTER.match(after):
            continue
        if number and (NUMBER_BEFORE.search(before) or NUMBER_AFTER.match(after)):
            continue
        if not (day and (DAY_BEFORE.search(before) or DAY_AFTER.match(after))):
            return True
    return False


@lru_cache(maxsize=256)
def _pattern(words: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(r"\s+".join(map(re.escape, words)), re.IGNORECASE)
