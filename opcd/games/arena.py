"""Games of the package `textarena`, without the rules that it would tell."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from opcd.games.environment import Environment, Step
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

# What textarena's games raise at wrong options, a wrong number of players, a missing package or an old Python.
REFUSALS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError),
    *(RuntimeError, SyntaxError, TypeError, ValueError),
)


class Arena:
    """One game of `textarena`: what it says, less its rules.

    Args:
        game: textarena's id.
        options: arguments of its class.

    Raises:
        UserError: textarena is not installed, has no such game, or the game refuses the options or one player.
    """

    def __init__(self, game: str, options: dict[str, Any]) -> None:
        require("games", "textarena", "a text game")
        from textarena.envs.registration import ENV_REGISTRY

        if game not in ENV_REGISTRY:
            raise UserError(f"game: textarena has no game {game!r}{did_you_mean(game, ENV_REGISTRY)}")
        self.game, self.options = game, options
        self._env: Any = None
        self._draws: Any = None
        try:
            self.reset(0)
        except REFUSALS as error:
            raise UserError(f"game: {game} does not start for one player with {options}: {error}") from error
        self._env = self._draws = None

    def reset(self, seed: int) -> str:
        """Begin the game of a seed."""
        import textarena

        with self._own_draws():
            self._env = textarena.make(self.game, **self.options)
            while isinstance(self._env, textarena.Wrapper):  # they join what is said with the rules
                self._env = self._env.env
            self._env.reset(num_players=1, seed=seed)
        return self._said()[0]

    def step(self, action: str | None) -> Step:
        """Take an action."""
        with self._own_draws():
            done, _ = self._env.step(action=f"[{action or 'none'}]")
        said, valid = self._said()
        if not done:
            return Step(said, valid, None)
        rewards, info = self._env.close()
        return Step(info[0]["reason"], valid and not info[0]["invalid_move"], rewards[0] >= 1)

    def _said(self) -> tuple[str, bool]:
        """The game's messages since the last call, without rules and the player's own, and whether none objects."""
        from textarena import ObservationType as Kind

        _, messages = self._env.get_observation()
        kept = [text.rstrip() for _, text, kind in messages if kind not in (Kind.PROMPT, Kind.PLAYER_ACTION)]
        return "\n".join(kept), all(kind is not Kind.GAME_ADMIN for _, _, kind in messages)

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Each game its own state of the module `random`, which textarena seeds and draws from; ours stays."""
        outside = random.getstate()
        if self._draws is not None:
            random.setstate(self._draws)
        try:
            yield
        finally:
            self._draws = random.getstate()
            random.setstate(outside)


class FrozenLake(Environment):
    """Walk over a frozen lake to the goal, around the holes; by default the paper's board.

    Args:
        size: cells of a side.
        holes: how many holes; every board has a way.
    """

    def __init__(self, size: int = 3, holes: int = 2) -> None:
        if size < 2 or not 0 <= holes <= (size - 1) ** 2:
            raise ValueError(f"FrozenLake wants size >= 2 and 0 <= holes <= (size - 1)^2, got {size} and {holes}")
        self._arena = Arena("FrozenLake-v0-raw", {"size": size, "num_holes": holes})

    def reset(self, seed: int) -> str:
        """Begin the game of a seed."""
        return self._arena.reset(seed)

    def step(self, action: str | None) -> Step:
        """Move up, down, left or right."""
        return self._arena.step(action)


class Sokoban(Environment):
    """Push boxes onto their places; by default the paper's room.

    Args:
        size: cells of a side, walls included.
        boxes: how many boxes.
    """

    def __init__(self, size: int = 6, boxes: int = 1) -> None:
        if size < 5 or boxes < 1:
            raise ValueError(f"Sokoban wants size >= 5 and boxes >= 1, got {size} and {boxes}")
        self._arena = Arena("Sokoban-v0-raw", {"dim_room": (size, size), "num_boxes": boxes})

    def reset(self, seed: int) -> str:
        """Begin the game of a seed."""
        return self._arena.reset(seed)

    def step(self, action: str | None) -> Step:
        """Move up, down, left or right."""
        return self._arena.step(action)


class TextArena(Environment):
    """Any game of `textarena` for one player. A reward of 1 or more at its end is success.

    Args:
        game: textarena's id, such as Minesweeper-v0-small. What is no rule is shown as it is.
        options: arguments of the game's class, such as {rows: 5}.
        instruction: what the player is told first; a game may say all that it says in its rules.
    """

    def __init__(self, game: str, options: dict[str, Any] | None = None, instruction: str = "") -> None:
        self._arena, self._instruction = Arena(game, options or {}), instruction

    def reset(self, seed: int) -> str:
        """Begin the game of a seed."""
        said = self._arena.reset(seed)
        return f"{self._instruction}\n{said}" if self._instruction else said

    def step(self, action: str | None) -> Step:
        """Take an action as the game spells it."""
        return self._arena.step(action)
