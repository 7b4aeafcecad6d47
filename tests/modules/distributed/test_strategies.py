"""How long a rank waits for the others."""

from datetime import timedelta
from functools import wraps

import pytest
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from opcd.modules import FSDP2Strategy
from opcd.modules.distributed.fsdp_strategy import PATIENCE, wait_for_rollouts
from tests.helpers.ranks import RANKS

FIVE = timedelta(minutes=5)


@pytest.mark.case("GPU-B9")
def test_a_rank_waits_for_the_longest_rollout_of_another():
    """16,384 tokens may take longer than Lightning's 30 minutes."""
    plain, own = DDPStrategy(), DDPStrategy(timeout=FIVE)
    for strategy in (plain, own, SingleDeviceStrategy()):
        wait_for_rollouts(strategy)
    assert (plain._timeout, own._timeout) == (PATIENCE, FIVE)
    assert (FSDP2Strategy()._timeout, FSDP2Strategy(timeout=FIVE)._timeout) == (PATIENCE, FIVE)


@pytest.mark.case("GPU-B9")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "auto"])
def test_the_command_waits(strategy, opcd, monkeypatch, tiny, rows, context, tmp_path):
    found = []

    @wraps(Trainer.fit)  # whose arguments the command reads
    def fit(self, *args, **options):
        found.append(self.strategy._timeout)

    monkeypatch.setattr(Trainer, "fit", fit)
    words = ("--model.student.name", tiny, "--data.train", rows, "--data.context", context)
    ranks = ("--trainer.strategy", strategy, "--trainer.default_root_dir", tmp_path)
    code, text = opcd("fit", *words, *RANKS, 2, *ranks, "--data.batch_size", 8)
    assert code == 0 and found == [PATIENCE], text
