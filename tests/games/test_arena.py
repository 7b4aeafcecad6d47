"""textarena's games: boards by seed, hidden rules, moves, and wrong ids."""

import importlib.util
import random
import re

import numpy as np
import pytest
import torch

from opcd.games import FrozenLake, Sokoban, TextArena
from opcd.runtime.errors import UserError
from opcd.runtime.extras import install_hint

MOVES = ("[right]", "[down]", "nonsense", "[right]", "[up]")
LAKE = """GAME: Current Board:

+-----+-----+-----+
|  P  |     |  H  |
+-----+-----+-----+
|  H  |     |     |
+-----+-----+-----+
|     |     |  G  |
+-----+-----+-----+

Available Actions: [up], [down], [left], [right], [w], [a], [s], [d]"""
ROOM = """GAME: Current Board:

# # # # # #
# # _ _ _ #
# # _ _ O #
# # # X _ #
# # # P _ #
# # # # # #

Available Moves: up, down, left, right"""


def played(game, replies=MOVES):
    for reply in replies:
        if game.success is None:
            game.take(reply)
    return game


@pytest.mark.parametrize(("environment", "board"), [(FrozenLake(), LAKE), (Sokoban(), ROOM)])
def test_a_seed_is_one_board(game, environment, board):
    assert game(environment, 7).transcript == board == game(type(environment)(), 7).transcript
    boards = {game(environment, seed).transcript for seed in range(40)}
    assert len(boards) > 10


@pytest.mark.parametrize("environment", [FrozenLake(), Sokoban()])
def test_games_side_by_side_are_as_alone(game, environment):
    alone = [played(game(environment, seed)).transcript for seed in range(4)]
    together = [game(environment, seed) for seed in range(4)]
    for reply in MOVES:
        for each in together:
            if each.success is None:
                each.take(reply)
    assert [each.transcript for each in together] == alone


def test_no_generator_is_disturbed(game):
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    for environment in (FrozenLake(), Sokoban(), TextArena("GuessTheNumber-v0")):
        played(game(environment, 3))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states  # noqa: NPY002


@pytest.mark.parametrize(("environment", "name"), [(FrozenLake(), "FrozenLake-v0-raw"), (Sokoban(), "Sokoban-v0-raw")])
def test_the_player_is_never_told_the_rules(game, environment, name):
    """No line of textarena's own prompt is in what a player sees, at any turn of any way to play."""
    import textarena

    raw = textarena.make(name)
    raw.reset(num_players=1, seed=0)
    told = next(text for _, text, kind in raw.get_observation()[1] if kind is textarena.ObservationType.PROMPT)
    rules = [line.strip() for line in told.splitlines() if line.strip()]
    assert len(rules) > 5
    for replies in (MOVES, ("[left]", "[left]"), ("[up]",) * 5, ("",) * 5, ("[right]", "[right]", "[down]", "[down]")):
        each = played(game(environment, 7), replies)
        seen = "\n".join(str(turn.prompt) for turn in each.turns) + each.transcript
        assert [rule for rule in rules if rule in seen] == []
        for word in ("Welcome", "Goal", "Hole", "Frozen", "win", "push all", "Objective"):
            assert word not in "".join(turn.prompt for turn in each.turns)


def test_the_lake_is_crossed_and_fallen_into(game):
    won = played(game(FrozenLake(), 7), ("[right]", "[ DOWN ]", "[d]", "I go [s]"))
    assert (won.success, won.feedback, len(won.turns)) == (True, "Congratulations! You reached the goal!", 4)
    lost = played(game(FrozenLake(), 7), ("[down]",))
    assert (lost.success, len(lost.turns)) == (False, 1)
    assert lost.feedback.startswith("You fell into a hole! Game over.")


def test_a_box_is_pushed_onto_its_place(game):
    assert [turn.valid for turn in played(game(Sokoban(), 0), ("[up]", "[up]")).turns] == [True, True]
    assert played(game(Sokoban(), 0), ("[up]", "[up]")).success is True
    assert played(game(Sokoban(), 0), ("[down]",) * 5).success is False


def test_two_refused_moves_in_a_row_end_the_game(game):
    lost = played(game(FrozenLake(), 7), ("[right]", "[jump]", "[down]", "[up] [jump]", "no brackets"))
    assert [turn.valid for turn in lost.turns] == [True, False, True, False, False]
    lost = played(game(FrozenLake(), 7), ("[up]", "nothing", "[right]"))
    assert (lost.success, [turn.valid for turn in lost.turns]) == (False, [False, False])


def test_other_games_of_textarena(game):
    guess = game(TextArena("GuessTheNumber-v0", {"max_number": 3}, instruction="Say a number from 1 to 3."), 5)
    assert "GAME: Say a number from 1 to 3." in guess.question.query and "higher" not in guess.question.query
    played(guess, ("[1]", "[2]", "[3]"))
    assert guess.success is True


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("FrozenLak", {}, "no game 'FrozenLak'; did you mean FrozenLake-v0"),
        ("xyzzyplugh", {}, "textarena has no game 'xyzzyplugh'$"),
        ("FrozenLake-v0-raw", {"sise": 3}, "FrozenLake-v0-raw does not start .* 'sise'"),
        ("TicTacToe-v0", {}, "TicTacToe-v0 does not start for one player"),
    ],
)
def test_games_that_cannot_be(name, options, message):
    with pytest.raises(UserError, match=message):
        TextArena(name, options)


def test_boards_that_cannot_be():
    with pytest.raises(ValueError, match="holes"):
        FrozenLake(size=3, holes=5)
    with pytest.raises(ValueError, match="boxes"):
        Sokoban(boxes=0)


def test_textarena_is_not_there(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "textarena" else found(name))
    with pytest.raises(UserError, match=re.escape(f"textarena, which is not installed: {install_hint('games')}")):
        FrozenLake()
