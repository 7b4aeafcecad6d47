"""What users of Lightning do: schedulers, their own callbacks, a notebook, Ctrl-C."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from opcd.cli import COMMANDS, TRAINER
from opcd.cli import fit as lightning_cli
from opcd.cli import main as cli
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, StudentRollout
from opcd.runtime import interruption
from opcd.runtime.errors import UserError
from opcd.runtime.generators import generators_kept
from opcd.runtime.interruption import Interrupted
from opcd.tasks.dapo_math import equal


@pytest.fixture
def fit(tiny, rows, context, opcd, tmp_path):
    """Run four batches an epoch of two rows, with an overlay."""

    def run(overlay: dict, *more: object) -> tuple[int, str]:
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
        return opcd(
            *("fit", "--config", tmp_path / "overlay.yaml", "--model.student.name", tiny, "--data.train", rows),
            *("--data.context", context, "--data.batch_size", 2, "--trainer.default_root_dir", tmp_path / "runs"),
            *("--model.rollout.init_args.sampling.max_new_tokens", 2, "--model.eval_sampling.max_new_tokens", 2),
            *("--trainer.precision", "32-true", *more),
        )

    return run


def callback(name: str, **arguments: object) -> dict:
    return {"callbacks": [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}]}


@pytest.mark.case("D8")
@pytest.mark.parametrize("where", ["torch.optim.lr_scheduler", "lightning.pytorch.cli"])
def test_a_scheduler_that_waits_for_a_metric_is_refused(fit, where, tmp_path):
    arguments = {"monitor": "train/divergence"} if "cli" in where else {}
    scheduler = {"class_path": f"{where}.ReduceLROnPlateau", "init_args": arguments}
    code, text = fit({"model": {"lr_scheduler": scheduler}})
    assert code == 2 and "model.lr_scheduler: ReduceLROnPlateau waits for a metric" in text and "OneCycleLR" in text
    assert not list((tmp_path / "runs").glob("version_*"))


@pytest.mark.case("D8")
def test_wrong_arguments_of_a_scheduler_are_told_before_a_model_loads(tiny):
    with pytest.raises(ValueError, match=r"model\.lr_scheduler: .*positive integer"):
        Distiller(ModelConfig(tiny), lr_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=-1))


@pytest.mark.case("D21")
def test_warm_up_and_cosine_decay(fit, tmp_path):
    scheduler = {"max_lr": 1e-3, "total_steps": 8, "pct_start": 0.25, "cycle_momentum": False}
    overlay = {
        "model": {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": scheduler}},
        "trainer": callback("LearningRateMonitor", logging_interval="step") | {"max_steps": 8},
    }
    code, text = fit(overlay)
    assert code == 0, text
    lines = (tmp_path / "runs/version_0/metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("lr-AdamW")
    rates = [float(value) for line in lines[1:] if (value := line.split(",")[column])]
    peak = max(range(len(rates)), key=rates.__getitem__)
    assert len(rates) == 8 and 1 <= peak <= 2 and rates[peak] == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(4e-5) and rates[peak:] == sorted(rates[peak:], reverse=True)
    code, text = fit(overlay, "--trainer.max_steps", 9)
    assert code == 2 and "OneCycleLR is made for 8 steps (total_steps), and the trainer takes 9" in text


@pytest.mark.case("D16")
@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        (callback("EarlyStopping", monitor="val/divergence"), "metric `val/divergence` which is not available"),
        (callback("EarlyStopping", monitor="nothing"), "metric `nothing` which is not available"),
        ({"val_check_interval": 10}, "must be less than or equal to the number of the training batches"),
        (callback("Timer", duration="00:00:00"), "not a valid duration"),
        (callback("Timer", duration="00:00:05:00", interval="day"), "interval=day"),
        (callback("LearningRateMonitor") | {"logger": False}, "no logger"),
    ],
)
def test_what_lightning_refuses_is_one_line(fit, overlay, message, rows):
    val = ("--data.val", rows) if "val_check_interval" in overlay else ()
    code, text = fit({"trainer": {"max_epochs": 1} | overlay}, *val)
    assert code == 2 and message in text and "Traceback" not in text, text
    assert text.count("opcd: error:") == 1 and "\n" not in text.split("opcd: error:")[1].strip()


@pytest.mark.case("D16")
def test_a_timer_is_a_timer(fit, tmp_path):
    overlay = {"trainer": callback("Timer", duration="00:00:05:00") | {"max_steps": 2}}
    code, text = fit(overlay)
    assert code == 0, text
    code, text = fit(overlay, "--ckpt_path", "last", "--trainer.max_steps", 3)
    assert code == 0, text
    assert (tmp_path / "runs/version_1/student").is_dir()


@pytest.mark.case("D24")
def test_predict_and_then_fit(tiny, rows, context, tmp_path):
    distiller = Distiller(ModelConfig(tiny), rollout=StudentRollout(Sampling(max_new_tokens=2)))
    distiller.answer = Sampling(max_new_tokens=2, temperature=0.0)
    data = ContextQueryDataModule(train=str(rows), predict=str(rows), val=str(rows), context=str(context))
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    options = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, **quiet}
    assert Trainer(**options).predict(distiller, data)
    trainer = Trainer(max_steps=1, **options)
    trainer.fit(distiller, data)
    assert trainer.global_step == 1
    teacher = distiller.teacher.model
    Trainer(**options).validate(distiller, data, verbose=False)
    assert distiller.teacher.model is teacher


@pytest.mark.case("D24")
def test_a_checkpoint_is_no_model(tmp_path):
    with pytest.raises(UserError, match=r"the folder student/ of its run"):
        Distiller.load_from_checkpoint(tmp_path / "step=1.ckpt", map_location="cpu")


@pytest.mark.case("D23")
def test_an_answer_is_scored_in_a_thread():
    found: list[object] = []

    def score() -> None:
        try:
            found.extend([equal("1/2", "0.5"), equal("1/2", "$\\frac{1}{2}$"), equal("3", "4")])
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=score)
    thread.start()
    thread.join(60)
    assert found == [True, True, False]


@pytest.mark.case("E2")
def test_generators_are_kept_where_a_signal_ends_the_block():
    before = torch.get_rng_state()
    with pytest.raises(Interrupted), generators_kept():
        torch.rand(3)
        raise Interrupted(signal.SIGTERM)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(Interrupted), isolate_rng():  # what Lightning's own does
        torch.rand(3)
        raise Interrupted(signal.SIGTERM)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.case("E3")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("name", [*COMMANDS, *TRAINER])
def test_every_command_ends_with_one_line(name, number, code, opcd, monkeypatch):
    def told(args: list[str]) -> int:
        os.kill(os.getpid(), number)
        raise AssertionError("not ended")

    module = SimpleNamespace(main=told)
    monkeypatch.setattr(lightning_cli, "run", told)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=lambda path: module))
    monkeypatch.setattr(cli, "checked", lambda name, words: words)  # a recipe that is not there comes first
    former = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    done, text = opcd(name)
    assert (done, text.count("\n")) == (code, 1)
    assert text.startswith(f"opcd: {signal.Signals(number).name}: asked to end")
    assert ("--ckpt_path last resumes" in text) is (name == "fit")
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == former
    interruption.check()  # nothing is left of it


@pytest.mark.case("E3")
def test_a_run_that_is_ended_while_a_model_loads_leaves_nothing(fit, monkeypatch, tmp_path):
    def told(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("opcd.modules.student.load_model", told)
    code, text = fit({"trainer": {"max_steps": 1}})
    assert code == 130 and "Traceback" not in text and text.count("SIGINT") == 1
    assert not list((tmp_path / "runs").iterdir())
