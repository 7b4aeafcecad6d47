"""From what an extractor wrote to lessons, and from lessons to a list that grows."""

import hashlib
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

WORDS = re.compile(r"\w+")


def read_lessons(text: str, marker: str) -> list[str]:
    """The lessons of an answer: what follows the marker on lines that begin with it, thoughts (<think>) left out.

    A bullet or number before the marker, Markdown's emphasis and the marker's case make no difference.
    """
    spoken = text.rpartition("</think>")[2]
    # Matched at the beginning of each line alone: linear time, whatever a model writes.
    line = re.compile(rf"[\s>*_\-•#\d.)]*{re.escape(marker.strip())}[*_]*[ \t]*(.*)", re.IGNORECASE)
    found = (" ".join(one[1].split()).strip("*_ ") for one in map(line.match, spoken.split("\n")) if one)
    return [lesson for lesson in found if WORDS.search(lesson)]


@dataclass(frozen=True)
class LessonList:
    """A list after some step, and what that step did to it. A line of lists.jsonl.

    Attributes:
        number: which of the lists, from 0.
        step: how many training items it has learnt from; 0: it is empty.
        lessons: the lessons, oldest first.
        seen: how often each was written, in its own or in other words.
        text: what stands in a prompt; "" for an empty list.
        tokens: tokens of `text`.
        added: lessons of this step that are new.
        joined: (lesson of this step, the earlier one that it was joined with).
        dropped: the oldest lessons, which no longer fit.
        too_long: lessons of this step that fit into no list.
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
        """Names the text; lists with one text have one id, and an empty one has none."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16] if self.text else None

    def record(self) -> dict[str, Any]:
        """The list as JSON has it."""
        return {"id": self.id, **asdict(self)}


@dataclass(frozen=True)
class Growth:
    """How a list takes in lessons.

    Attributes:
        render: the text of a list, from its lessons.
        count: tokens of a text.
        max_tokens: most tokens of a list's text.
        near: least likeness of two lessons that are joined; None joins only the same words.
    """

    render: Callable[[Sequence[str]], str]
    count: Callable[[str], int]
    max_tokens: int
    near: float | None

    def __call__(self, before: LessonList, found: Sequence[str]) -> LessonList:
        """The list after one more step, which found these lessons."""
        seen = dict(zip(before.lessons, before.seen, strict=True))
        words = {lesson: _words(lesson) for lesson in seen}
        added, joined, too_long = [], [], []
        for lesson in found:
            if self._tokens([lesson]) > self.max_tokens:
                too_long.append(lesson)
            elif (earlier := self._same(_words(lesson), words)) is not None:
                joined.append((lesson, earlier))
                seen[earlier] += 1
            else:
                added.append(lesson)
                seen[lesson], words[lesson] = 1, _words(lesson)
        dropped = self._oldest(list(seen))
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

    def _tokens(self, lessons: Sequence[str]) -> int:
        return self.count(self.render(lessons))

    def _oldest(self, lessons: list[str]) -> list[str]:
        """The oldest lessons, as few as leave a list that fits."""
        fits = bisect_left(
            range(len(lessons)), True, key=lambda start: self._tokens(lessons[start:]) <= self.max_tokens
        )
        return lessons[:fits]

    def _same(self, words: list[str], earlier: Mapping[str, list[str]]) -> str | None:
        """The first earlier lesson that says the same, or nearly; of the earlier ones the words are given."""
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
