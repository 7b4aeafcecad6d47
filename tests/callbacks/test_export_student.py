"""The written student takes the place of a former one, and of nothing else."""

import pytest
from lightning.pytorch import Trainer

from opcd.callbacks import ExportStudent
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, StudentRollout
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import MANIFEST


def fit(tmp_path, rows, context, tiny, **options):
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[ExportStudent(**options)],
    )
    data = ContextQueryDataModule(train=str(rows), context=str(context), batch_size=2)
    trainer.fit(Distiller(ModelConfig(name=tiny), rollout=StudentRollout(Sampling(max_new_tokens=2))), datamodule=data)


@pytest.mark.case("E1")
def test_a_folder_student_of_the_users_is_refused_before_training(tmp_path, rows, context, tiny, monkeypatch):
    package = tmp_path / "run" / "student"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("my code")
    monkeypatch.setattr("opcd.modules.distiller.Student.load", None)
    with pytest.raises(UserError, match=r"ExportStudent: .*student holds files that opcd did not write there"):
        fit(tmp_path / "run", rows, context, tiny)
    assert [file.read_text() for file in package.iterdir()] == ["my code"]


@pytest.mark.case("E1")
def test_a_former_student_is_replaced(tmp_path, rows, context, tiny):
    for _ in range(2):
        fit(tmp_path / "run", rows, context, tiny)
    assert [entry.name for entry in (tmp_path / "run").iterdir()] == ["student"]
    assert {MANIFEST, "model.safetensors", "config.json"} <= {
        file.name for file in (tmp_path / "run/student").iterdir()
    }
