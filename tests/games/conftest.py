"""Rows of games, and a tiny model whose window holds them."""

import json
import shutil
from pathlib import Path

import pytest

from opcd.data import ContextQueryDataModule
from opcd.games import Environment, Game, GameSeeds
from opcd.models import ModelConfig
from tests.helpers.rows import LESSONS


@pytest.fixture(scope="session")
def roomy(tiny, tmp_path_factory) -> str:
    """The tiny model with a window of 8,192 tokens."""
    folder = tmp_path_factory.mktemp("models") / "roomy"
    shutil.copytree(tiny, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    return str(folder)


@pytest.fixture
def lessons(tmp_path) -> Path:
    """A file with the context."""
    file = tmp_path / "lessons.txt"
    file.write_text(LESSONS)
    return file


@pytest.fixture
def game_data(lessons, roomy):
    """A data module of the games of an environment, set up for training."""

    def make(environment: Environment, count: int, **options) -> ContextQueryDataModule:
        data = ContextQueryDataModule(
            **{"train": GameSeeds(environment, 0, count), "context": str(lessons), "batch_size": count} | options,
            student=ModelConfig(name=roomy),
        )
        data.setup("fit")
        return data

    return make


@pytest.fixture
def game():
    """One game of an environment."""

    def make(environment: Environment, seed: int, max_turns: int = 5) -> Game:
        return Game(GameSeeds(environment, seed, 1, max_turns).examples("data.train")[0])

    return make
