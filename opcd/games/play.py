"""Playing games: prompts from the moves so far, actions from replies, and many games side by side."""

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

PROBED = 16
PROBES = ("[up]", "[right]", "[down]", "[left]", "")
"""Moves that show how much a turn adds to the prompt; a game without these moves answers with its own message."""

# Longer than any name of a move, but bounded: the text goes into the prompts of all later turns.
ACTION = re.compile(r"\[\s*([^\[\]\n]{0,39}[^\[\]\s])\s*\]")


@dataclass
class GameExample(Example):
    """A game to play, as a row of a data set. Its query is the prompt of the next move.

    Attributes:
        environment: the environment; a game copies it.
        seed: seed of the game.
        max_turns: maximum number of moves.
    """

    environment: Environment
    seed: int
    max_turns: int


@dataclass(frozen=True)
class Turn:
    """One move: the prompt, the player's full reply, its action (None: none), and whether the game accepted it."""

    prompt: str
    reply: str
    action: str | None
    valid: bool


class Game:
    """One game of an environment, from its beginning.

    Attributes:
        example: the row of the game.
        turns: the moves so far.
        success: whether it was won; None while it runs.
        feedback: the game's text after the last move; empty while it runs.

    Args:
        example: the game; its query is not used.
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
        """The row whose query is the prompt of the next move, with the game so far."""
        return replace(self.example, query=PROMPT.replace("{situation}", "\n".join(self._said)))

    @property
    def transcript(self) -> str:
        """The situations and the player's full replies, without the last text."""
        replies = iter(turn.reply for turn in self.turns)
        told = [line if line.startswith("GAME: ") else f"PLAYER: {next(replies)}" for line in self._said]
        return "\n".join(told)

    def take(self, reply: str) -> None:
        """Make the move of a player's reply."""
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
    """The last text in square brackets of a reply, after its reasoning; None if there is none.

    Text in <think> ... </think>, or after a <think> that the length limit left open, does not count.
    """
    answer = reply.rpartition("</think>")[2]
    found = ACTION.findall("" if "<think>" in answer else answer)
    return found[-1] if found else None


def play(games: Sequence[Game], respond: Callable[[list[Game]], list[str]]) -> None:
    """Play games to their ends, side by side.

    Args:
        games: games that have not ended.
        respond: returns a reply to the question of each game that it gets. It is called once per turn, with all games
            that still run.
    """
    while running := [game for game in games if game.success is None]:
        for game, reply in zip(running, respond(running), strict=True):
            game.take(reply)


def history_tokens(examples: Sequence[GameExample], length: Callable[[GameExample], int]) -> int:
    """Estimate by how many tokens the last prompt of a game exceeds its first, from moves in the first few games.

    Args:
        examples: the games.
        length: returns the tokens of a prompt.
    """
    most = 0
    for number, game in enumerate(Game(example) for example in examples[:PROBED]):
        before, further = length(game.question), game.example.max_turns - 1
        while game.success is None and len(game.turns) < further:
            game.take(PROBES[(number + len(game.turns)) % len(PROBES)])
            after = length(game.question)
            most, before = max(most, (after - before) * further), after
    return most
