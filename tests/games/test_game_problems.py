"""Games in the experience loop: attempts of a scripted player, exact."""

import pytest

from examples.environment import Doors
from opcd.experience import GameProblems, Writer, Written
from opcd.games import GameSeeds
from opcd.runtime.errors import UserError


class Opener(Writer):
    """Opens door after door; with a context, it knows that the third is right."""

    def __init__(self):
        self.asked = []

    def write(self, conversations, context=None):
        self.asked.append((len(conversations), context))
        turns = [messages[0]["content"].count("YOU: ") for messages in conversations]
        doors = [3 if context else turn + 1 for turn in turns]
        return [Written(f"I try [{door}].", 4, cut_off=door == 2) for door in doors]


@pytest.fixture
def problems():
    return GameProblems(GameSeeds(Doors(), 0, 4), GameSeeds(Doors(), 10, 3))


def test_items_are_seeds(problems):
    assert problems.training() == ["Doors, seed 0", "Doors, seed 1", "Doors, seed 2", "Doors, seed 3"]
    assert problems.validation() == ["Doors, seed 10", "Doors, seed 11", "Doors, seed 12"]


def test_attempts(problems):
    writer = Opener()
    items = ["Doors, seed 2", "Doors, seed 0", "Doors, seed 11", "Doors, seed 0"]
    attempts = problems.attempt(items, writer, None)
    assert writer.asked == [(4, None), (2, None), (2, None)]
    assert [attempt.item for attempt in attempts] == items
    assert [attempt.success for attempt in attempts] == [True] * 4
    assert [(attempt.tokens, attempt.cut_off) for attempt in attempts] == [
        (12, True),
        (4, False),
        (12, True),
        (4, False),
    ]
    assert attempts[0].details == {"turns": 3, "actions": ["1", "2", "3"], "invalid_moves": 0}
    assert attempts[0].transcript == (
        "A game, whose rules the player was not told. Its course:\nGAME: Doors: [1], [2], [3]\nPLAYER: I try [1].\n"
        "GAME: Door 1 is shut.\nPLAYER: I try [2].\nGAME: Door 2 is shut.\nPLAYER: I try [3]."
    )
    assert attempts[0].outcome == "The game was won. It opens."


def test_attempts_with_lessons(problems):
    writer = Opener()
    attempts = problems.attempt(["Doors, seed 2", "Doors, seed 1"], writer, "Take door 3.")
    assert [attempt.success for attempt in attempts] == [True, False]
    assert writer.asked == [(2, "Take door 3.")] + [(1, "Take door 3.")] * 4
    assert "The game was not won. Door 3 is shut.\nThe game is over" in str(attempts[1].outcome)


def test_parts_that_share_seeds_are_refused():
    with pytest.raises(UserError, match=r"init_args\.train and problems\.init_args\.val share seed 3 of Doors"):
        GameProblems(GameSeeds(Doors(), 0, 4), GameSeeds(Doors(), 3, 3))
