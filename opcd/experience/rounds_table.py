"""The table of a run's finished rounds: rounds.jsonl, a line for each."""

from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from opcd.results.run_files import read_shaped

TABLE = "rounds.jsonl"


@dataclass(frozen=True)
class Round:
    """A line of rounds.jsonl. The scores are shares of successful validation items.

    Attributes:
        round: the number of the round, from 1.
        student_before: the score of the student that the round starts with, without lessons.
        without: the score of the model of `select`, without lessons.
        selected: the score of the same model with the selected list in its prompt.
        lessons: lessons of the selected list.
        tokens: tokens of its text.
        divergence: the last `train/divergence` of the distillation; None where no metrics are logged.
        student_after: the score of the distilled student, without lessons.
        items: the number of validation items.
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
    """Read the finished rounds; a line that cannot be read is left out, and added to the problems."""
    shape = get_type_hints(Round)
    return [Round(**{name: row[name] for name in shape}) for row in read_shaped(out / TABLE, shape, problems)]
