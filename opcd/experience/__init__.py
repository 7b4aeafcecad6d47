"""Experience: solve problems, extract lessons, accumulate them, select the best list on held-out problems.

`Problems` are the items to attempt, a `Writer` is the model that attempts them.
"""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.experience.game_problems import GameProblems
    from opcd.experience.math_problems import MathProblems
    from opcd.experience.problems import Attempt, Problems, Writer
    from opcd.writing.written import Written

__all__ = ["Attempt", "GameProblems", "MathProblems", "Problems", "Writer", "Written"]

__getattr__ = lazily(__name__)
