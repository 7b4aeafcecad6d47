"""The callbacks of `opcd fit` in a Trainer of one's own."""

import json

from lightning import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from opcd.callbacks import AnswerSamples, RecoveryAndDrift, default_callbacks
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, StudentRollout
from tests.helpers.rows import CONTEXT, ROWS, read_rows


def test_a_trainer_has_what_the_command_adds(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "--fast"])
    student = ModelConfig(tiny)
    distiller = Distiller(student, rollout=StudentRollout(Sampling(max_new_tokens=2)))
    distiller.eval_sampling = Sampling(max_new_tokens=2, temperature=0.0)
    samples, recovery = AnswerSamples(queries=2), RecoveryAndDrift(2, 1, 2)
    callbacks = default_callbacks(samples, recovery)
    assert callbacks[:2] == [samples, recovery] and len({type(one) for one in callbacks}) == len(callbacks) == 10
    options = {"accelerator": "cpu", "enable_model_summary": False, "logger": CSVLogger(tmp_path)}
    trainer = Trainer(max_steps=1, callbacks=callbacks, **options)
    trainer.fit(distiller, ContextQueryDataModule(train=ROWS, context=[CONTEXT], student=student, batch_size=2))
    run = tmp_path / "lightning_logs" / "version_0"
    assert {"environment.json", "samples.jsonl", "recovery.jsonl", "checkpoints", "student"} <= {
        file.name for file in run.iterdir()
    }
    assert (run / "checkpoints" / "step=1.ckpt").is_file()
    assert [row["step"] for row in read_rows(run / "samples.jsonl")] == [0, 0, 0, 0, 1, 1]
    assert json.loads((run / "environment.json").read_text())["command"] == "python train.py --fast"
    assert "`python train.py --fast`" in (run / "student" / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(run / "student")


def test_what_a_trainer_does_without():
    names = {type(one).__name__ for one in default_callbacks(fit=False, progress=False, checkpoints=False)}
    assert names == {"WriteEnvironment", "ExactResume", "ExportStudent", "PredictionWriter"}
    assert not {"StepProgress", "SaveCheckpoints"} & {
        type(one).__name__ for one in default_callbacks(progress=False, checkpoints=False)
    }
