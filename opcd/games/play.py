"""Playing: prompts out of what was said so far, actions out of replies, and many games at once."""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from opcd.data import Example
from opcd.games.environment import Environment

PROMPT = """You are playing a game, one move at a time. Its rules are not told: they show in what your moves lead to.

Situation:
{situation}

What is your next move? End your answer with it in square brackets."""

# Longer than any name of a move: what a player writes there goes into the prompts of all its later turns.
ACTION = re.compile(r"\[\s*([^\[\]\n]{0,39}[^\[\]\s])\s*\]")


@dataclass
class GameExample(Example):
    """A game to play, as a row of a data set. Its query is the prompt of the next move.

    Attributes:
        environment: what is played; a game copies it.
        seed: which of its games.
        max_turns: most moves.
    """

    environment: Environment
    seed: int
    max_turns: int


@dataclass(frozen=True)
class Turn:
    """One move: the prompt, the player's whole reply, the action in it (None: none), and whether the game took it."""

    prompt: str
    reply: str
    action: str | None
    valid: bool


class Game:
    """One game of an environment, from its first situation on.

    Attributes:
        example: the row that it is.
        turns: the moves so far.
        success: whether it was won; None while it goes on.
        feedback: what was said after the last move; empty while it goes on.

    Args:
        example: which game. Its query plays no part.
    """

    def __init__(self, example: GameExample) -> None:
        self.example = example
        self._environment = copy.deepcopy(example.environment)
        self._said = [f"GAME: {self._environment.reset(example.seed)}"]
        self.turns: list[Turn] = []
        self.success: bool | None = None
        self.feedback = ""

    @property
    def question(self) -> GameExample:
        """The row whose query is the prompt of the next move, with all that was said so far."""
        return replace(self.example, query=PROMPT.replace("{situation}", "\n".join(self._said)))

    @property
    def transcript(self) -> str:
        """The situations and the player's whole replies, less how it ended."""
        replies = iter(turn.reply for turn in self.turns)
        told = [line if line.startswith("GAME: ") else f"PLAYER: {next(replies)}" for line in self._said]
        return "\n".join(told)

    def take(self, reply: str) -> None:
        """Take a player's reply as the next move."""
        action = last_action(reply)
        step = self._environment.step(action)
        self.turns.append(Turn(str(self.question.query), reply, action, step.valid))
        self.success = step.success
        said = step.said
        if self.success is None and len(self.turns) == self.example.max_turns:
            self.success = False
            said += f"\nThe game is over: no more than {self.example.max_turns} moves are allowed."
        self._said.append(f"YOU: [{action}]" if action else "YOU: (no move in square brackets)")
        if self.success is None:
            self._said.append(f"GAME: {said}")
        else:
            self.feedback = said


def last_action(reply: str) -> str | None:
    """The last text in square brackets of a reply, after its reasoning; None where there is none.

    Text within <think> ... </think>, or after a <think> that the length limit left open, is no answer.
    """
    answer = reply.rpartition("</think>")[2]
    found = ACTION.findall("" if "<think>" in answer else answer)
    return found[-1] if found else None


def play(games: Sequence[Game], respond: Callable[[list[Game]], list[str]]) -> None:
    """Play games to their ends, side by side.

    Args:
        games: games that have not ended.
        respond: a reply to the question of each game that it gets. It is called as often as the longest game has
            turns, each time with all games that still go on.
    """
    while running := [game for game in games if game.success is None]:
        for game, reply in zip(running, respond(running), strict=True):
            game.take(reply)
