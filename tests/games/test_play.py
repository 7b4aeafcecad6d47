"""Replies as moves, prompts, and the end of a game."""

import pytest

from examples.environment import Doors
from opcd.games import last_action, play


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        ("[up]", "up"),
        ("First [up], no: [down].", "down"),
        ("[up] or maybe [fly]", "fly"),
        ("[ Left ]", "Left"),
        ("[3 4]", "3 4"),
        ("[[right]]", "right"),
        ("up", None),
        ("", None),
        ("[]", None),
        ("[ ]", None),
        ("[up] []", "up"),
        ("[ up\n]", "up"),
        ("[up\ndown]", None),
        (f"[{'x' * 40}]", "x" * 40),
        (f"[{'x' * 41}]", None),
        ("<think>[up]</think> so [down]", "down"),
        ("<think>[up]</think> so down", None),
        ("[up]</think>[left]", "left"),
        ("<think>is it [up]", None),
    ],
)
def test_the_last_bracketed_text_is_the_move(reply, action):
    assert last_action(reply) == action


def test_a_prompt_holds_all_that_was_said(game):
    each = game(Doors(), 2)
    each.take("Maybe [1]?")
    each.take("no idea")
    assert each.question.query == (
        "You are playing a game, one move at a time. Its rules are not told: they show in what your moves lead to.\n\n"
        "Situation:\nGAME: Doors: [1], [2], [3]\nYOU: [1]\nGAME: Door 1 is shut.\n"
        "YOU: (no move in square brackets)\nGAME: There is no such door.\n\n"
        "What is your next move? End your answer with it in square brackets."
    )
    assert each.transcript == (
        "GAME: Doors: [1], [2], [3]\nPLAYER: Maybe [1]?\nGAME: Door 1 is shut.\n"
        "PLAYER: no idea\nGAME: There is no such door."
    )
    assert [(turn.reply, turn.action, turn.valid) for turn in each.turns] == [
        ("Maybe [1]?", "1", True),
        ("no idea", None, False),
    ]


def test_no_more_moves_than_allowed(game):
    games = [game(Doors(), seed, max_turns) for seed, max_turns in ((0, 2), (1, 2), (2, 2), (2, 5))]
    asked = []

    def respond(running):
        asked.append([games.index(each) for each in running])
        return [f"[{len(each.turns) + 1}]" for each in running]

    play(games, respond)
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [3]]
    assert [each.success for each in games] == [True, True, False, True]
    assert [len(each.turns) for each in games] == [1, 2, 2, 3]
    assert games[2].feedback == "Door 2 is shut.\nThe game is over: no more than 2 moves are allowed."


def test_five_moves_by_default(game):
    each = game(Doors(), 0)
    play([each], lambda running: ["[2]"])
    assert (len(each.turns), each.success) == (5, False)
