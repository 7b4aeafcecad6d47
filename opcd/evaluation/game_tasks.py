"""Games as tasks of an evaluation: one row per game, scored by its outcome."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from opcd.evaluation.batched_answers import Answer, Answering, gather_on, prompt_ids, rank_and_ranks
from opcd.evaluation.scores import Row
from opcd.evaluation.task_prompts import Prompts
from opcd.games import Game, GameExample, play
from opcd.games.play import history_tokens

GENERATION = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "max_gen_toks": 1024}
"""The sampling of a reply, as in the paper's code for games; a game has several replies."""


@dataclass(frozen=True)
class GameRows:
    """A task whose rows are games.

    Attributes:
        name: the task's name.
        source: a description of the games.
        examples: the games, one per row.
        metrics: success: the share of games that are won; invalid_moves: the share of moves that the game rejected;
            turns: moves per game. Every game has a score for each.
        generation: how replies are drawn, in lm-eval's words.
        thinking: None, because the paper's players use their model's default.
        chat: replies are asked for through the chat template.
        generates: replies are generated.
        higher_is_better: more games that are won are better.
    """

    name: str
    source: str
    examples: list[GameExample]
    metrics: tuple[str, ...] = ("success", "invalid_moves", "turns")
    generation: dict[str, Any] = field(default_factory=lambda: dict(GENERATION))
    thinking: bool | None = None
    chat: bool = True
    generates: bool = True
    higher_is_better: bool = True

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def row_metrics(self) -> tuple[str, ...]:
        """All metrics."""
        return self.metrics

    def longest_request(self, prompts: Prompts) -> tuple[int, int]:
        """Tokens of the longest prompt, twice: nothing is appended. The prompts of later moves are estimated."""

        def length(example: GameExample) -> int:
            return len(prompt_ids(prompts.views, example.query, prompts.context, example.source))

        longest = max(map(length, self.examples)) + history_tokens(self.examples, length)
        return longest, longest


def game_rows(task: GameRows, number: int, answering: Answering, seed: int, show: Callable[[int], None]) -> list[Row]:
    """Play all games of a task once, side by side. Each rank plays its share; rank 0 gets all rows.

    Args:
        task: the games.
        number: the number of the sample, for the rows.
        answering: the player.
        seed: seed of torch's generator; it should differ between ranks.
        show: called with each number of games that have ended.
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
    return rows if ranks == 1 else [row for part in gather_on(0, rows) or [] for row in part]


def _replies(answering: Answering, games: list[Game]) -> list[Answer]:
    questions = [(game.question.query, game.question.source) for game in games]
    prompts = [prompt_ids(answering.views, query, answering.context, source) for query, source in questions]

    def answers(batch_size: int) -> list[Answer]:
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
