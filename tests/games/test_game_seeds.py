"""Seeds as rows, and splits that share some."""

import pytest

from examples.environment import Doors
from opcd.callbacks import LMEval
from opcd.data import ContextQueryDataModule
from opcd.evaluation import Evaluation
from opcd.games import FrozenLake, GameSeeds, Sokoban
from opcd.modules import Distiller
from opcd.runtime.errors import UserError
from tests.helpers.training import trainer


def test_rows():
    rows = GameSeeds(Doors(), 5, 3, max_turns=2).examples("data.val")
    assert [(row.index, row.seed, row.source, row.max_turns) for row in rows] == [
        (0, 5, "data.val: seed 5", 2),
        (1, 6, "data.val: seed 6", 2),
        (2, 7, "data.val: seed 7", 2),
    ]
    assert "Doors: [1], [2], [3]" in rows[0].query and rows[0].reference is None
    assert str(GameSeeds(Doors(), 5, 3)) == "Doors, seeds 5 to 7, at most 5 moves"


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (GameSeeds(Doors(), 0, 10), GameSeeds(Doors(), 10, 10), None),
        (GameSeeds(Doors(), 0, 10), GameSeeds(Doors(), 9, 10), "seed 9 of Doors"),
        (GameSeeds(Doors(), 5, 100), GameSeeds(Doors(4), 0, 8), "the seeds 5 to 7 of Doors"),
        (GameSeeds(FrozenLake(), 0, 10), GameSeeds(Sokoban(), 0, 10), None),
    ],
)
def test_what_two_share(one, other, shared):
    assert one.overlap(other) == other.overlap(one) == shared


@pytest.mark.parametrize("splits", [("train", "val"), ("train", "test"), ("val", "test")])
def test_splits_that_share_seeds_are_refused(splits):
    sources = dict(zip(splits, (GameSeeds(Doors(), 0, 10), GameSeeds(Doors(), 8, 5)), strict=True))
    with pytest.raises(UserError, match=f"data.{splits[0]} and data.{splits[1]} share the seeds 8 to 9 of Doors"):
        ContextQueryDataModule(**sources)


def test_rows_to_predict_may_be_those_of_the_test():
    seeds = GameSeeds(Doors(), 0, 10)
    assert ContextQueryDataModule(test=seeds, predict=seeds).sources["predict"] is seeds


def test_games_that_are_evaluated_are_not_trained_on(tmp_path, context):
    callback = LMEval(Evaluation(tasks=["doors"], data={"doors": GameSeeds(Doors(), 9, 5)}))
    data = ContextQueryDataModule(train=GameSeeds(Doors(), 0, 10), context=str(context))
    with pytest.raises(UserError, match=r"evaluation\.data\.doors and data.train share seed 9 of Doors"):
        run = trainer(tmp_path, callbacks=[callback])
        run.fit(Distiller(), datamodule=data)


@pytest.mark.parametrize("wrong", [{"start": -1, "count": 1}, {"start": 0, "count": 0}])
def test_no_such_seeds(wrong):
    with pytest.raises(ValueError, match="GameSeeds needs"):
        GameSeeds(Doors(), **wrong)
