"""Lessons read from an extractor's answer, and lists of lessons that grow step by step."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

WORDS = re.compile(r"\w+")


def read_lessons(text: str, marker: str) -> list[str]:
    """Read the lessons of an answer: the text after the marker on lines that begin with it, outside of <think>.

    A bullet or number before the marker, Markdown emphasis and the case of the marker do not matter.
    """
    spoken = text.rpartition("</think>")[2]
    # Matched only at the beginning of each line: linear time for any text.
    line = re.compile(rf"[\s>*_\-•#\d.)]*{re.escape(marker.strip())}[*_]*[ \t]*(.*)", re.IGNORECASE)
    found = (" ".join(one[1].split()).strip("*_ ") for one in map(line.match, spoken.split("\n")) if one)
    return [lesson for lesson in found if WORDS.search(lesson)]


@dataclass(frozen=True)
class LessonList:
    """A list after a step, and the changes of that step. A line of lists.jsonl.

    Attributes:
        number: the number of the list, from 0.
        step: the number of training items that the lessons come from; 0: the list is empty.
        lessons: the lessons, oldest first.
        seen: how often each lesson was written, in the same or in similar words.
        text: the text in a prompt; "" for an empty list.
        tokens: tokens of `text`.
        added: new lessons of this step.
        joined: (lesson of this step, the earlier lesson that it was joined with).
        dropped: the oldest lessons, which no longer fit.
        too_long: lessons of this step that are over the limit by themselves.
    """

    number: int
    step: int = 0
    lessons: tuple[str, ...] = ()
    seen: tuple[int, ...] = ()
    text: str = ""
    tokens: int = 0
    added: tuple[str, ...] = ()
    joined: tuple[tuple[str, str], ...] = ()
    dropped: tuple[str, ...] = ()
    too_long: tuple[str, ...] = ()

    @property
    def id(self) -> str | None:
        """The id of the text: equal texts have equal ids; None for an empty list."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16] if self.text else None

    def record(self) -> dict[str, Any]:
        """The list as a JSON record."""
        return {"id": self.id, **asdict(self)}


@dataclass(frozen=True)
class Growth:
    """The rules by which lessons are added to a list.

    Attributes:
        render: makes the text of a list from its lessons.
        count: counts the tokens of a text.
        max_tokens: most tokens of a list's text.
        near: least similarity of two lessons that are joined; None: only equal words are joined.
    """

    render: Callable[[Sequence[str]], str]
    count: Callable[[str], int]
    max_tokens: int
    near: float | None

    def __call__(self, before: LessonList, found: Sequence[str]) -> LessonList:
        """Make the list after one more step, with the lessons of that step."""
        seen = dict(zip(before.lessons, before.seen, strict=True))
        words = {lesson: _words(lesson) for lesson in seen}
        added, joined, too_long = [], [], []
        for lesson in found:
            if not self._fits([lesson]):
                too_long.append(lesson)
            elif (earlier := self._same(_words(lesson), words)) is not None:
                joined.append((lesson, earlier))
                seen[earlier] += 1
            else:
                added.append(lesson)
                seen[lesson], words[lesson] = 1, _words(lesson)
        lessons = list(seen)
        first = bisect_left(range(len(lessons)), True, key=lambda start: self._fits(lessons[start:]))
        dropped = lessons[:first]  # as few as leave a list that fits
        for lesson in dropped:
            del seen[lesson]
        text = self.render(list(seen)) if seen else ""
        return LessonList(
            number=before.number,
            step=before.step + 1,
            lessons=tuple(seen),
            seen=tuple(seen.values()),
            text=text,
            tokens=self.count(text) if text else 0,
            added=tuple(added),
            joined=tuple(joined),
            dropped=tuple(dropped),
            too_long=tuple(too_long),
        )

    def _fits(self, lessons: Sequence[str]) -> bool:
        return self.count(self.render(lessons)) <= self.max_tokens

    def _same(self, words: list[str], earlier: Mapping[str, list[str]]) -> str | None:
        """The first earlier lesson with the same or similar words; `earlier` maps lessons to their words."""
        for other, others in earlier.items():
            if words == others or (self.near is not None and _alike(words, others, self.near)):
                return other
        return None


def _words(text: str) -> list[str]:
    return WORDS.findall(text.casefold())


def _alike(one: list[str], other: list[str], least: float) -> bool:
    """Whether difflib's ratio over words (twice the words in common over all words) is at least `least`."""
    if 2 * min(len(one), len(other)) < least * (len(one) + len(other)):
        return False  # no more words can be in common
    first, second = sorted((one, other))  # the ratio is not symmetric
    matcher = SequenceMatcher(None, first, second, autojunk=False)
    return all(ratio() >= least for ratio in (matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio))
