"""Games of the package `textarena`, played without showing their rules."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opcd.games.environment import Environment, Step
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

# What textarena's games raise for wrong options, a wrong number of players, a missing package or an old Python.
REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


class TextArena(Environment):
    """Any game of `textarena` for one player. A reward of 1 or more at its end is success.

    Args:
        game: textarena's id, such as Minesweeper-v0-small. All its messages are shown except the rules.
        options: arguments of the game's class, such as {rows: 5}.
        instruction: text before the first message; needed where a game says everything in its rules.

    Raises:
        UserError: textarena is not installed, has no such game, or the game refuses the options or one player.
    """

    def __init__(self, game: str, options: dict[str, Any] | None = None, instruction: str = "") -> None:
        require("games", "textarena", "a text game")
        from textarena.envs.registration import ENV_REGISTRY

        if game not in ENV_REGISTRY:
            raise UserError(f"game: textarena has no game {game!r}{did_you_mean(game, ENV_REGISTRY)}")
        self._game, self._options, self._instruction = game, options or {}, instruction
        self._env: Any = None
        self._draws: Any = None
        try:
            self.reset(0)
        except REFUSALS as error:
            raise UserError(f"game: {game} does not start for one player with {self._options}: {error}") from error
        self._env = self._draws = None

    def reset(self, seed: int) -> str:
        """Begin the game of a seed."""
        import textarena

        with self._own_draws():
            self._env = textarena.make(self._game, **self._options)
            while isinstance(self._env, textarena.Wrapper):  # wrappers add the rules to the messages
                self._env = self._env.env
            self._env.reset(num_players=1, seed=seed)
        said, _ = self._said()
        return f"{self._instruction}\n{said}" if self._instruction else said

    def step(self, action: str | None) -> Step:
        """Take an action, spelled as in the game."""
        with self._own_draws():
            done, _ = self._env.step(action=f"[{action or 'none'}]")
        said, valid = self._said()
        if not done:
            return Step(said, valid, None)
        rewards, info = self._env.close()
        return Step(info[0]["reason"], valid and not info[0]["invalid_move"], rewards[0] >= 1)

    def _said(self) -> tuple[str, bool]:
        """The game's new messages, without rules and the player's own, and whether none of them rejects the action."""
        from textarena import ObservationType as Kind

        _, messages = self._env.get_observation()
        kept = [text.rstrip() for _, text, kind in messages if kind not in (Kind.PROMPT, Kind.PLAYER_ACTION)]
        return "\n".join(kept), all(kind is not Kind.GAME_ADMIN for _, _, kind in messages)

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Give the game its own state of the module `random`, which textarena seeds; then restore the global one."""
        outside = random.getstate()
        if self._draws is not None:
            random.setstate(self._draws)
        try:
            yield
        finally:
            self._draws = random.getstate()
            random.setstate(outside)


class FrozenLake(TextArena):
    """Walk over a frozen lake to the goal, around the holes; by default the paper's board.

    Args:
        size: cells per side.
        holes: number of holes; every board has a path to the goal.
    """

    def __init__(self, size: int = 3, holes: int = 2) -> None:
        if size < 2 or not 0 <= holes <= (size - 1) ** 2:
            raise ValueError(f"FrozenLake needs size >= 2 and 0 <= holes <= (size - 1)^2, got {size} and {holes}")
        super().__init__("FrozenLake-v0-raw", {"size": size, "num_holes": holes})


class Sokoban(TextArena):
    """Push boxes onto their places; by default the paper's room.

    Args:
        size: cells per side, walls included.
        boxes: number of boxes.
    """

    def __init__(self, size: int = 6, boxes: int = 1) -> None:
        if size < 5 or boxes < 1:
            raise ValueError(f"Sokoban needs size >= 5 and boxes >= 1, got {size} and {boxes}")
        super().__init__("Sokoban-v0-raw", {"dim_room": (size, size), "num_boxes": boxes})
