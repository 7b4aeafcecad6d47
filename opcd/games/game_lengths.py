"""How long the prompts of a game become."""

from collections.abc import Callable, Sequence

from opcd.games.play import Game, GameExample

PROBED = 16
PROBES = ("[up]", "[right]", "[down]", "[left]", "")
"""Moves that show how much a turn adds to the prompt; a game that has none of them objects in its own words."""


def history_tokens(examples: Sequence[GameExample], length: Callable[[GameExample], int]) -> int:
    """Tokens by which the last prompt of a game exceeds its first, as the moves of the first few games suggest.

    Args:
        examples: the games.
        length: tokens of a prompt.
    """
    most = 0
    for number, game in enumerate(Game(example) for example in examples[:PROBED]):
        before, further = length(game.question), game.example.max_turns - 1
        while game.success is None and len(game.turns) < further:
            game.take(PROBES[(number + len(game.turns)) % len(PROBES)])
            after = length(game.question)
            most, before = max(most, (after - before) * further), after
    return most
