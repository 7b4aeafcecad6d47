"""Text games: environments, data sets of games, and rollouts that play them (the extra `games`)."""

from opcd.games.arena import FrozenLake, Sokoban, TextArena
from opcd.games.environment import Environment, Step
from opcd.games.game_rollout import GameRollout
from opcd.games.game_seeds import GameSeeds
from opcd.games.play import Game, GameExample, Turn, last_action, play

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
