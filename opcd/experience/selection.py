"""The scores of lists on validation items, and the choice of the best list."""

from collections.abc import Sequence
from dataclasses import dataclass

from opcd.evaluation.intervals import wilson
from opcd.experience.lessons import LessonList
from opcd.runtime.errors import UserError


@dataclass(frozen=True)
class Score:
    """The score of one list. A line of scores.jsonl.

    Attributes:
        number: the number of the list; None: no list in the prompt.
        step: the number of training items that the list's lessons come from; None without a list.
        id: the id of the list's text; None without a list.
        lessons: the number of lessons.
        tokens: tokens of the list's text.
        right: the number of successful validation items.
        items: the number of validation items.
        success: right / items.
        low: lower bound of the 95 % interval (Wilson) of `success`.
        high: its upper bound.
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
        """Make the score of a list (None: of the prompt without a list) from the success at each validation item."""
        right, items = sum(successes), len(successes)
        result = (right, items, right / items, *wilson(right, items))
        if version is None:
            return cls(None, None, None, 0, 0, *result)
        return cls(version.number, version.step, version.id, len(version.lessons), version.tokens, *result)


def to_score(versions: Sequence[LessonList], every: int) -> list[LessonList]:
    """The lists to score: those after every `every`-th step and after the last one, without the empty ones."""
    last = max(version.step for version in versions)
    return [v for v in versions if v.lessons and (v.step % every == 0 or v.step == last)]


def best(scores: Sequence[Score]) -> Score:
    """The list with the highest success; of equal ones the shortest (tokens, then lessons), then the earliest."""
    lists = [score for score in scores if score.id is not None]
    if not lists:
        raise UserError("no list was scored: all lists are empty at the steps of select.every; lower it")
    return min(lists, key=lambda s: (-s.right / s.items, s.tokens, s.lessons, s.step, s.number))


def best_of_each(scores: Sequence[Score]) -> list[Score]:
    """The best version of every list; equal texts once."""
    numbers = sorted({score.number for score in scores if score.number is not None})
    chosen = [best([score for score in scores if score.number == number]) for number in numbers]
    return list({score.id: score for score in reversed(chosen)}.values())[::-1]
