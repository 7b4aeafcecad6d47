"""Experience: solve problems, extract lessons, accumulate them, select the best list on held-out problems.

What is attempted is a `Problems`, who attempts it a `Writer`.
"""

from opcd.experience.games import GameProblems
from opcd.experience.maths import MathProblems
from opcd.experience.problems import Attempt, Problems, Writer, Written

__all__ = ["Attempt", "GameProblems", "MathProblems", "Problems", "Writer", "Written"]
