"""Games as tasks of an evaluation: a row a game, scored by how it ended."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed

from opcd.evaluation.batched_answers import Answer, Answering, prompt_ids
from opcd.evaluation.scores import Row
from opcd.games import Game, GameExample, GameSeeds, play
from opcd.games.game_seeds import as_game
from opcd.games.play import history_tokens

GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_gen_toks": 1024}
"""A reply, as the paper's code evaluates games; a game has several."""


@dataclass(frozen=True)
class GameRows:
    """A task whose rows are games.

    Attributes:
        name: its name.
        source: which games.
        examples: the games, one a row.
        metrics: names of its metrics: the share of games that are won, the share of moves that a game did not take,
            and moves a game.
        generation: how replies are drawn, in lm-eval's words.
        thinking: None, for the paper's players do what their model does.
        higher_is_better: more games that are won are better.
    """

    name: str
    source: str
    examples: list[GameExample]
    metrics: tuple[str, ...] = ("success", "invalid_moves", "turns")
    generation: dict[str, Any] = field(default_factory=lambda: dict(GENERATION))
    thinking: bool | None = None
    higher_is_better: bool = True

    @classmethod
    def of(cls, name: str, seeds: GameSeeds, limit: int | None, key: str) -> "GameRows":
        """The first `limit` games, or all; `key` is the config key of `seeds`."""
        return cls(name, str(seeds), [as_game(example) for example in seeds.examples(key)[:limit]])

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def row_metrics(self) -> tuple[str, ...]:
        """All of them: each game has its scores."""
        return self.metrics

    def longest_prompt(self, length: Callable[[str | list[dict[str, str]], str], int]) -> int:
        """Tokens of the longest prompt; those of later moves are estimated."""

        def of(example: GameExample) -> int:
            """Tokens of its first prompt."""
            return length(example.query, example.source)

        return max(map(of, self.examples)) + history_tokens(self.examples, of)


def rank_and_ranks() -> tuple[int, int]:
    """This process's number in its process group, and how many there are."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def game_rows(task: GameRows, number: int, answering: Answering, seed: int, show: Callable[[int], None]) -> list[Row]:
    """Play all games of a task once, side by side; each rank plays its share, and rank 0 gets the rows of all.

    Args:
        task: the games.
        number: of the sample, for the rows.
        answering: the player.
        seed: of torch's generator; another one for each rank.
        show: told how many games have ended.
    """
    rank, ranks = rank_and_ranks()
    games = {index: Game(example) for index, example in enumerate(task.examples) if index % ranks == rank}
    replies: dict[int, list[Answer]] = {id(game): [] for game in games.values()}
    ended = 0

    def respond(running: list[Game]) -> list[str]:
        """The next move of each game."""
        nonlocal ended
        show(len(games) - len(running) - ended)
        ended = len(games) - len(running)
        found = _replies(answering, running)
        for game, reply in zip(running, found, strict=True):
            replies[id(game)].append(reply)
        return list(found)

    torch.manual_seed(seed)
    play(list(games.values()), respond)
    show(len(games) - ended)
    rows = [_row(game, replies[id(game)], index, number) for index, game in games.items()]
    if ranks == 1:
        return rows
    parts: list[Any] | None = [None] * ranks if rank == 0 else None
    torch.distributed.gather_object(rows, parts)
    return [row for part in parts or [] for row in part]


def _replies(answering: Answering, games: list[Game]) -> list[Answer]:
    questions = [(game.question.query, game.question.source) for game in games]
    prompts = [prompt_ids(answering.views, query, answering.context, source) for query, source in questions]

    def answers(batch_size: int) -> list[Answer]:
        """All replies, so many games at once."""
        starts = range(0, len(prompts), batch_size)
        return [answer for start in starts for answer in answering.batch(prompts[start : start + batch_size])]

    return answering.in_batches(answers, max(map(len, prompts)))


def _row(game: Game, replies: list[Answer], index: int, number: int) -> Row:
    return {
        "index": index,
        "sample": number,
        "seed": game.example.seed,
        "query": game.example.query,
        "response": game.transcript,
        "reference": None,
        "actions": [turn.action for turn in game.turns],
        "feedback": game.feedback,
        "success": bool(game.success),
        "invalid_moves": [not turn.valid for turn in game.turns],
        "turns": len(game.turns),
        "tokens": [reply.tokens for reply in replies],
        "cut_off": [reply.cut_off for reply in replies],
    }
