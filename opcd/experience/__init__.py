"""Experience: solve problems, extract lessons, accumulate them, select the best list on held-out problems.

What is attempted is a `Problems`, who attempts it a `Writer`.
"""

from typing import TYPE_CHECKING

from opcd.lazy import lazily

if TYPE_CHECKING:
    from opcd.experience.games import GameProblems
    from opcd.experience.maths import MathProblems
    from opcd.experience.problems import Attempt, Problems, Writer, Written

__all__ = ["Attempt", "GameProblems", "MathProblems", "Problems", "Writer", "Written"]

__getattr__ = lazily(__name__)
