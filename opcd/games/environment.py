"""What a text game is here."""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What an action led to.

    Attributes:
        said: what the game says next; after the last move, how it ended.
        valid: whether the game took the action.
        success: whether the game is won; None while it goes on.
    """

    said: str
    valid: bool
    success: bool | None


class Environment(ABC):
    """A game for one player, told in text, with its rules hidden.

    One object is one game at a time; every game is played on a copy (`copy.deepcopy`). What `reset` and `step` say
    shows the board and names the actions, and never tells what they do or what the goal is: that is for the player to
    find out. The same seed is the same game, and Python's, NumPy's and torch's own generators are left as they were.
    """

    @abstractmethod
    def reset(self, seed: int) -> str:
        """Begin the game of a seed: what the player sees first."""

    @abstractmethod
    def step(self, action: str | None) -> Step:
        """Take an action, the text without its brackets; None where the player named none."""
