"""The rounds of a run that have finished, a line each."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from opcd.results.run_files import read_shaped

TABLE = "rounds.jsonl"


@dataclass(frozen=True)
class Round:
    """A line of rounds.jsonl. Shares of validation items that went well.

    Attributes:
        round: its number, from 1.
        student_before: of the student that the round begins with, without lessons.
        without: of the model of `select`, without lessons.
        selected: the same with the selected list in its prompt.
        lessons: of the selected list.
        tokens: of its text.
        divergence: the last `train/divergence` of the distillation; None where no metrics are logged.
        student_after: of the distilled student, without lessons.
        items: validation items.
    """

    round: int
    student_before: float
    without: float
    selected: float
    lessons: int
    tokens: int
    divergence: float | None
    student_after: float
    items: int


def read_rounds(out: Path, problems: list[str]) -> list[Round]:
    """The rounds that have finished; what cannot be read is left out, and named among the problems."""
    shape = get_type_hints(Round)
    return [Round(**{name: row[name] for name in shape}) for row in read_shaped(out / TABLE, shape, problems)]
