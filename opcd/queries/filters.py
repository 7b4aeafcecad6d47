"""Why a question is not kept: rules over its text, and over the answers with and without the context."""

import re
from collections.abc import Iterable
from functools import lru_cache

from opcd.tasks.matching import holds

SPECIAL = re.compile(r"<\|[^|>]*\|>|</?s>|\[/?INST\]|<(start|end)_of_turn>|</?think>")
NAMES_THE_TEXT = re.compile(
    r"\b(the|this|that|your|following|given|above|provided)\s+(\w+\s+)?"
    r"(text|passage|paragraph|document|excerpt|article|sentence|statement|context|section|prompt|instructions?)\b"
    r"|\baccording to (it|the)\b|\b(mentioned|described|stated|given|listed) (above|here|in the)\b",
    re.IGNORECASE,
)
LABEL = re.compile(r"^\W*(question|query|message|user|q)\s*(\d+)?\s*[:.)]\s*", re.IGNORECASE)
NUMBERED = re.compile(r"^\s*(\d{1,2}[.)]|[-*•])\s+")
NEAR = 0.8
"""Share of common words from which two questions are near duplicates."""
QUOTES = "\"'\u201c\u201d\u2018\u2019"
COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been but by can do does for from had has have he her his how i if in into is it its may "
        "me my of on one or our she should so than that the their them there they this to was we were what when where "
        "which who whom whose why will with would you your",
    )
)
"""Words that say nothing of a fact."""


def cleaned(text: str) -> str:
    """The question in what a model wrote: its first line with words, without a label, a number or quotes."""
    line = next((line.strip() for line in text.split("\n") if re.search(r"\w", line)), "")
    line = NUMBERED.sub("", LABEL.sub("", NUMBERED.sub("", line))).strip(" *_`")
    while len(line) > 1 and line[0] in QUOTES and line[-1] in QUOTES:
        line = line[1:-1].strip()
    return line


def flaw(question: str, raw: str, cut_off: bool, about: frozenset[str] | None) -> str | None:
    """Why a question cannot be used, by its own text; None where nothing speaks against it.

    Args:
        question: as `cleaned`.
        raw: what the model wrote.
        cut_off: whether the limit of tokens ended it.
        about: `names` of the fact and its subject, of which the question must hold one. None: no fact is asked for.
    """
    if SPECIAL.search(raw):
        return "control tokens"
    if not re.search(r"\w{2}", question):
        return "empty"
    if cut_off and question[-1] not in "?.!" and question in raw.rstrip().split("\n")[-1]:
        return "truncated"
    if NAMES_THE_TEXT.search(question):
        return "names the text"
    if about is not None and "?" not in question:
        return "no question"
    if about is not None and not (about & words(question)):
        return "does not name what it is about"
    return None


def names(text: str, around: str = "") -> frozenset[str]:
    """Words of a text by which one can tell what it is about, in lower case.

    Those with a capital, but no words that `around`, the text that it is from, has in lower case too: the Hut of "Kolm
    Hut" does not tell which hut. Of a text without such words, the long ones.
    """
    capital = {word.lower() for word in re.findall(r"\b[A-Z\u00c0-\u00de]\w+", text)} - COMMON
    small = frozenset(re.findall(r"\b[^\W\dA-Z\u00c0-\u00de]\w+", around))
    return frozenset(capital - small) or frozenset(capital) or frozenset(word for word in words(text) if len(word) > 4)


@lru_cache(maxsize=4096)
def words(text: str) -> frozenset[str]:
    """The words and numbers of a text, in lower case."""
    return frozenset(re.findall(r"\w+", text.lower()))


def likeness(one: str, other: str) -> float:
    """Common words over all words of two texts, 0 to 1 (Jaccard)."""
    both = words(one) | words(other)
    return len(words(one) & words(other)) / len(both) if both else 1.0


def repeats(question: str, others: Iterable[str]) -> str | None:
    """Why a question repeats another one: near duplicates have nearly the same words, and the same that say something.

    A question of other names or numbers asks for something else; one of other words is a paraphrase, which is wanted.
    """
    for other in others:
        if " ".join(question.lower().split()) == " ".join(other.lower().split()):
            return "duplicate"
        if likeness(question, other) >= NEAR and words(question) - COMMON == words(other) - COMMON:
            return "near duplicate"
    return None


def reference(question: str, answer: str, source: str) -> str | None:
    """The fact in an answer: its longest run of names or numbers that the source has and the question has not."""
    asked, runs = words(question), [[""]]
    for match in re.finditer(r"[^\s]+", answer):
        token = match.group().strip(".,;:!?()[]*_" + QUOTES)
        new = token and not words(token) <= asked and holds(source, token)
        if new and (token[:1].isupper() or token[:1].isdigit()) and token.lower() not in COMMON:
            runs[-1].append(token)
        if not new or match.group()[-1:] in ".,;:!?":
            runs.append([""])
    best = max((" ".join(run[1:]) for run in runs), key=len)
    return best if best and holds(answer, best) else None


def says_something_new(question: str, answer: str, source: str) -> bool:
    """Whether an answer has words of the source that the question does not hold already."""
    return bool((words(answer) & words(source)) - words(question) - COMMON)
