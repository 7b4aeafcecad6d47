"""A run that goes on from a checkpoint is the run that was never stopped, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.drills.fits import differences
from opcd.callbacks import ExactResume
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import (
    Distiller,
    MixedRollout,
    MovingAverageTeacher,
    RecordedRollout,
    Rollout,
    Sampling,
    StudentRollout,
    TeacherRollout,
)
from tests.helpers.rows import write_rows

STEPS = 8  # two epochs of three batches, and two batches of the third


@pytest.fixture(scope="module")
def dropout(tiny, tmp_path_factory) -> str:
    """The tiny model with dropout in its attention: its training pass draws random numbers."""
    folder = tmp_path_factory.mktemp("models") / "dropout"
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model.config.attention_dropout = 0.1
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return str(folder)


SAMPLING = Sampling(max_new_tokens=6)


def mixed() -> Rollout:
    return MixedRollout([StudentRollout(SAMPLING), TeacherRollout(SAMPLING)], [0.5, 0.5])


def replayed() -> Rollout:
    """Responses of the first four steps, then of the last four."""
    return RecordedRollout(refresh_every_n_steps=4, rollout=StudentRollout(SAMPLING))


def fit(
    folder: Path,
    student: str,
    ckpt_path: Path | None = None,
    workers: int = 0,
    rollout: Callable[[], Rollout] = mixed,
) -> dict:
    """Train to `STEPS`, with a checkpoint after every step; the last one."""
    own = "Answer with a number, in one word, and never with more than that; the rule holds for every question"
    rows = [{"query": f"What is {n} + {n}?", **({"context": f"{own} {n}."} if n > 4 else {})} for n in range(6)]
    contexts = folder.parent / "contexts.json"
    contexts.write_text(json.dumps([f"The harbour master of Quillhaven is called {name}." for name in "ABC"]))
    data = ContextQueryDataModule(
        train=str(write_rows(folder.parent / "rows.jsonl", rows)),
        context=str(contexts),
        batch_size=2,
        num_workers=workers,
    )
    distiller = Distiller(
        ModelConfig(name=student),
        MovingAverageTeacher(0.9),
        rollout=rollout(),
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=STEPS),
    )
    torch.manual_seed(0 if ckpt_path is None else 1)
    trainer = Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[ExactResume(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)],
    )
    trainer.fit(distiller, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return torch.load(folder / f"step={STEPS}.ckpt", weights_only=True)


def unlike(one: object, other: object) -> list[str]:
    """Where two checkpoints differ, but for the folder that they lie in."""
    return [path for path in differences(one, other) if "ModelCheckpoint" not in path]


@pytest.mark.filterwarnings("ignore:.*pre-optimization state was saved", "ignore:The dirpath has changed")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_bit_equal(dropout, tmp_path, workers):
    whole = fit(tmp_path / "whole", dropout)
    for step in (1, 3, 6) if workers == 0 else (3, 5):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        assert unlike(whole, fit(tmp_path / f"from_{step}", dropout, checkpoint, workers)) == []
    for step in (4, 6) if workers == 0 else ():  # again, within the epoch that the run went on in, and at its end
        checkpoint = tmp_path / "from_3" / f"step={step}.ckpt"
        assert unlike(whole, fit(tmp_path / f"from_3_and_{step}", dropout, checkpoint, workers)) == []


@pytest.mark.filterwarnings("ignore:.*pre-optimization state was saved", "ignore:The dirpath has changed")
def test_a_resumed_run_replays_the_responses_of_the_first(dropout, tmp_path):
    whole = fit(tmp_path / "whole", dropout, rollout=replayed)
    assert len(whole["exact_resume"][0]["rollout"][0]["written"]) < 4 * 2  # some of four batches of two were replayed
    for step in (2, 3, 4, 7):
        checkpoint = tmp_path / "whole" / f"step={step}.ckpt"
        assert unlike(whole, fit(tmp_path / f"from_{step}", dropout, checkpoint, rollout=replayed)) == []


@pytest.mark.filterwarnings("ignore:.*pre-optimization state was saved", "ignore:The dirpath has changed")
def test_states_of_another_number_of_ranks(dropout, tmp_path):
    fit(tmp_path / "whole", dropout)
    checkpoint = torch.load(tmp_path / "whole" / "step=6.ckpt", weights_only=True)
    checkpoint["exact_resume"] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    with pytest.warns(UserWarning, match="states of 2 ranks and there are 1"):
        fit(tmp_path / "resumed", dropout, tmp_path / "two.ckpt")
