"""Data sets of games, one for each seed."""

from opcd.data import Example, ExampleSource, OnBadRow
from opcd.games.environment import Environment
from opcd.games.play import Game, GameExample
from opcd.runtime.errors import UserError


class GameSeeds(ExampleSource):
    """Games of one environment, one row for each seed: start, start + 1, ...

    Training, validation and test need different seeds: a run in which two of them share one is an error.

    Args:
        environment: the game.
        start: the first seed.
        count: number of seeds.
        max_turns: maximum number of moves of a game.
    """

    def __init__(self, environment: Environment, start: int, count: int, max_turns: int = 5) -> None:
        if start < 0 or count < 1 or max_turns < 1:
            raise ValueError(
                "GameSeeds needs start >= 0, count >= 1 and max_turns >= 1, "
                f"got start={start}, count={count}, max_turns={max_turns}"
            )
        self.environment, self.start, self.count, self.max_turns = environment, start, count, max_turns

    def __str__(self) -> str:
        name = type(self.environment).__name__
        return f"{name}, seeds {self.start} to {self.start + self.count - 1}, at most {self.max_turns} moves"

    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """The rows, with the first prompt of each game as the query."""
        return [
            Game(
                GameExample(
                    query="",
                    context=None,
                    response=None,
                    reference=None,
                    index=number,
                    source=f"{key}: seed {seed}",
                    environment=self.environment,
                    seed=seed,
                    max_turns=self.max_turns,
                )
            ).question
            for number, seed in enumerate(range(self.start, self.start + self.count))
        ]

    def overlap(self, other: ExampleSource) -> str | None:
        """The seeds that both have, if their environments are of one class, whatever its settings."""
        if not isinstance(other, GameSeeds) or type(other.environment) is not type(self.environment):
            return None
        first = max(self.start, other.start)
        last = min(self.start + self.count, other.start + other.count) - 1
        if first > last:
            return None
        seeds = f"seed {first}" if first == last else f"the seeds {first} to {last}"
        return f"{seeds} of {type(self.environment).__name__}"


def as_game(example: Example) -> GameExample:
    """The example as a game. UserError if it is another row."""
    if not isinstance(example, GameExample):
        raise UserError(
            f"{example.source}: GameRollout plays games, and this row is not a game; "
            "set the source (data.train, data.val, ...) to opcd.games.GameSeeds, or choose another model.rollout"
        )
    return example
