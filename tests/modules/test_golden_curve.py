"""A training of 20 steps whose losses a refactor must not move."""

from functools import partial

import pytest
import torch
from lightning import Callback, seed_everything

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, FrozenTeacher, MixedRollout, Sampling, StudentRollout, TeacherRollout
from tests.helpers.training import trainer

CURVE = [
    *(10.0038376, 9.6676197, 9.6269550, 9.6587782, 9.6154728, 9.3343210, 9.3533916),
    *(9.4128313, 9.4252424, 9.2840281, 9.5182600, 9.1385746, 9.0263538, 9.1188297),
    *(8.9774494, 9.1169014, 9.1269684, 8.7985086, 9.1167955, 9.2780600),
]
"""train/divergence of each step, in nats a token: float32, on a CPU. The random models are far apart."""


class Losses(Callback):
    """Keeps what each step logs."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, module, *others):
        self.values.append(float(trainer.callback_metrics["train/divergence"]))


def test_the_losses_of_20_steps(tmp_path, tiny, tiny_teacher, rows, context):
    seed_everything(0, verbose=False)
    greedy = Sampling(max_new_tokens=8, temperature=0.0)  # no draw may hang on the last bit of a probability
    losses = Losses()
    student = ModelConfig(tiny, dtype="float32")
    distiller = Distiller(
        student=student,
        teacher=FrozenTeacher(ModelConfig(tiny_teacher, dtype="float32")),
        rollout=MixedRollout([StudentRollout(greedy, dtype="float32"), TeacherRollout(greedy)], [0.5, 0.5]),
        optimizer=partial(torch.optim.AdamW, lr=1e-3),
        micro_batch_tokens=256,
    )
    data = ContextQueryDataModule(train=str(rows), context=str(context), batch_size=4, student=student)
    trainer(tmp_path, 20, precision="32-true", callbacks=[losses]).fit(distiller, datamodule=data)
    assert losses.values == pytest.approx(CURVE, rel=1e-5)
