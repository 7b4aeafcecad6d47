"""Experience: solve problems, extract lessons, accumulate them, select the best list on held-out problems.

What is attempted is a `Problems`, who attempts it a `Writer`.
"""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.experience.game_problems import GameProblems
    from opcd.experience.math_problems import MathProblems
    from opcd.experience.problems import Attempt, Problems, Writer, Written

__all__ = ["Attempt", "GameProblems", "MathProblems", "Problems", "Writer", "Written"]

__getattr__ = lazily(__name__)
