"""The interface of a text game."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The result of an action.

    Attributes:
        said: the game's next text; after the last move, how the game ended.
        valid: whether the game accepted the action.
        success: whether the game is won; None while it runs.
    """

    said: str
    valid: bool
    success: bool | None


class Environment(ABC):
    """A text game for one player, with hidden rules.

    An object plays one game at a time; every game is played on a copy (`copy.deepcopy`). The texts of `reset` and
    `step` show the board and name the actions. They do not tell what an action does or what the goal is: the player
    must find out. The same seed must give the same game. Python's, NumPy's and torch's global generators must not
    change.
    """

    @abstractmethod
    def reset(self, seed: int) -> str:
        """Begin the game of a seed and return the first text for the player."""

    @abstractmethod
    def step(self, action: str | None) -> Step:
        """Take an action, without its brackets; None if the player named none."""
