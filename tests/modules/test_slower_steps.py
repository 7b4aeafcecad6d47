"""What takes longer than `make test-fast` may: a training that must learn, and single steps of SmolLM2-135M."""

from functools import partial

import pytest
import torch

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, FrozenTeacher, RecordedRollout, Sampling, SelfTeacher, StudentRollout
from tests.helpers.training import gradients, relative_difference, trainer


def test_training_lowers_the_divergence(tmp_path, rows, context, tiny, tiny_teacher):
    """On-policy, with sampling: the student comes closer to a teacher of another size."""
    student = ModelConfig(name=tiny)
    data = ContextQueryDataModule(train=str(rows), val=str(rows), context=str(context), student=student)
    optimizer = partial(torch.optim.AdamW, lr=3e-3)
    rollout = StudentRollout(Sampling(max_new_tokens=8))
    teacher = FrozenTeacher(ModelConfig(name=tiny_teacher))
    distiller = Distiller(student, teacher, rollout=rollout, optimizer=optimizer)
    before = trainer(tmp_path).validate(distiller, datamodule=data)[0]["val/divergence"]
    trainer(tmp_path, steps=30, limit_val_batches=0).fit(distiller, datamodule=data)
    after = trainer(tmp_path).validate(distiller, datamodule=data)[0]["val/divergence"]
    assert after < 0.85 * before


@pytest.mark.slow
def test_micro_batches_of_the_real_model(tmp_path, recorded):
    """One step of SmolLM2-135M in float64 with micro-batches of one, three and eight rows.

    In float32 the gradients differ by 5e-6 on one CPU and by 5e-5 on another: kernels for one row and for eight round
    differently through thirty layers, and the loss is a difference of nearly equal numbers. In float64: 6e-9 at most.
    """
    recorded.setup("fit")
    longest = recorded.longest_student_prompt("train") + 10
    runs = []
    for rows in (1, 3, 8):
        distiller = Distiller(teacher=SelfTeacher(), rollout=RecordedRollout(), micro_batch_tokens=rows * longest)
        runs.append(gradients(tmp_path, recorded, distiller, precision="64-true"))
    assert relative_difference(runs[0], runs[2]) < 1e-7
    assert relative_difference(runs[1], runs[2]) < 1e-7


def test_the_shared_prefix_of_the_real_model(tmp_path, recorded):
    """Loss and gradients of a step of SmolLM2-135M in float32, with one pass of the context and with eight."""
    losses, runs = [], []
    for mode in ("always", "never"):
        teacher = FrozenTeacher(ModelConfig(dtype="float32"))
        distiller = Distiller(teacher=teacher, rollout=RecordedRollout(), shared_prefix=mode)
        runs.append(gradients(tmp_path, recorded, distiller))
        losses.append(float(distiller.trainer.callback_metrics["train/divergence"]))
        assert bool(teacher.prefix._entries) == (mode == "always")
        assert distiller.student._rows._agrees == (mode == "always")
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert relative_difference(*runs) < 1e-5
