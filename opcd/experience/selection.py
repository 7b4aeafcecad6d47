"""Scores of lists on validation items, and the choice among them."""

from collections.abc import Sequence
from dataclasses import dataclass

from opcd.evaluation.intervals import wilson
from opcd.experience.lessons import LessonList
from opcd.runtime.errors import UserError


@dataclass(frozen=True)
class Score:
    """What one list reached. A line of scores.jsonl.

    Attributes:
        number: which of the lists; None: no list in the prompt.
        step: how many training items the list had learnt from when it was scored; None without a list.
        id: names the list's text; None without a list.
        lessons: how many.
        tokens: of the list's text.
        right: validation items that went well.
        items: validation items.
        success: the share of the two.
        low: lower bound of its 95 % interval (Wilson).
        high: upper bound.
    """

    number: int | None
    step: int | None
    id: str | None
    lessons: int
    tokens: int
    right: int
    items: int
    success: float
    low: float
    high: float

    @classmethod
    def of(cls, version: LessonList | None, successes: Sequence[bool]) -> "Score":
        """The score of a list (None: of the prompt without one), from what came of each validation item."""
        right, items = sum(successes), len(successes)
        shown = (None, None, None, 0, 0)
        if version is not None:
            shown = (version.number, version.step, version.id, len(version.lessons), version.tokens)  # type: ignore[assignment]
        return cls(*shown, right, items, right / items, *wilson(right, items))


def to_score(versions: Sequence[LessonList], every: int) -> list[LessonList]:
    """The lists that are scored: after every so many steps and after the last one, the empty ones left out."""
    last = max(version.step for version in versions)
    return [v for v in versions if v.lessons and (v.step % every == 0 or v.step == last)]


def best(scores: Sequence[Score]) -> Score:
    """The list with the greatest success; of equals the shortest (tokens, then lessons), then the earliest."""
    lists = [score for score in scores if score.id is not None]
    if not lists:
        raise UserError("no list was scored: all are empty at the steps of select.every; lower it")
    return min(lists, key=lambda s: (-s.right / s.items, s.tokens, s.lessons, s.step, s.number))


def best_of_each(scores: Sequence[Score]) -> list[Score]:
    """The best version of every list, each text once."""
    numbers = sorted({score.number for score in scores if score.number is not None})
    chosen = [best([score for score in scores if score.number == number]) for number in numbers]
    return list({score.id: score for score in reversed(chosen)}.values())[::-1]
