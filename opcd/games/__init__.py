"""Text games: environments, data sets of their seeds, and rollouts that play them (the extra `games`)."""

from opcd.games.arena import FrozenLake, Sokoban, TextArena
from opcd.games.environment import Environment, Step
from opcd.games.play import Game, GameExample, Turn, last_action, play
from opcd.games.rollout import GameRollout
from opcd.games.seeds import GameSeeds

__all__ = [
    "Environment",
    "FrozenLake",
    "Game",
    "GameExample",
    "GameRollout",
    "GameSeeds",
    "Sokoban",
    "Step",
    "TextArena",
    "Turn",
    "last_action",
    "play",
]
