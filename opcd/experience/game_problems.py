"""Games as problems: the player is not told the rules, and lessons come from finished games."""

from collections.abc import Sequence

from opcd.data.example import Message
from opcd.experience.problems import Attempt, Problems, Writer
from opcd.games import Game, GameExample, GameSeeds, play
from opcd.games.game_seeds import as_game
from opcd.runtime.errors import UserError
from opcd.writing.written import Written

KEY = "problems.init_args"


class GameProblems(Problems):
    """Games by their seeds; those of a batch are played together. The outcome is the last message of a game.

    Set `extract.show_outcome`: an attempt does not say by itself whether the game was won.

    Args:
        train: games that lessons come from.
        val: games to select a list by. Do not report results on games of either.
    """

    def __init__(self, train: GameSeeds, val: GameSeeds) -> None:
        if (shared := train.overlap(val)) is not None:
            raise UserError(f"{KEY}.train and {KEY}.val share {shared}; give each its own")
        self._parts = {name: _by_id(seeds, f"{KEY}.{name}") for name, seeds in (("train", train), ("val", val))}

    def training(self) -> Sequence[str]:
        """Ids of the training games: their environment and seed."""
        return list(self._parts["train"])

    def validation(self) -> Sequence[str]:
        """Ids of the validation games."""
        return list(self._parts["val"])

    def attempt(self, items: Sequence[str], writer: Writer, context: str | None) -> list[Attempt]:
        """One play of each game."""
        known = self._parts["train"] | self._parts["val"]
        games = [Game(known[item]) for item in items]
        replies: dict[int, list[Written]] = {id(game): [] for game in games}

        def respond(running: list[Game]) -> list[str]:
            """The next move of each game."""
            written = writer.write([_conversation(game) for game in running], context)
            for game, reply in zip(running, written, strict=True):
                replies[id(game)].append(reply)
            return [reply.text for reply in written]

        play(games, respond)
        return [_attempt(item, game, replies[id(game)]) for item, game in zip(items, games, strict=True)]


def _by_id(seeds: GameSeeds, key: str) -> dict[str, GameExample]:
    rows = [as_game(example) for example in seeds.examples(key)]
    return {f"{type(row.environment).__name__}, seed {row.seed}": row for row in rows}


def _conversation(game: Game) -> list[Message]:
    return [{"role": "user", "content": str(game.question.query)}]


def _attempt(item: str, game: Game, replies: list[Written]) -> Attempt:
    return Attempt(
        item=item,
        transcript=f"A game, whose rules the player was not told. Its course:\n{game.transcript}",
        outcome=f"{'The game was won.' if game.success else 'The game was not won.'} {game.feedback}",
        success=bool(game.success),
        tokens=sum(reply.tokens for reply in replies),
        cut_off=any(reply.cut_off for reply in replies),
        details={
            "turns": len(game.turns),
            "actions": [turn.action for turn in game.turns],
            "invalid_moves": sum(not turn.valid for turn in game.turns),
        },
    )
