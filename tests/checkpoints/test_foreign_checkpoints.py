"""Checkpoints of somebody else's, and files that are none."""

import os
import pickle
from pathlib import Path

import pytest
import torch

from opcd.checkpoints import BrokenCheckpoint, check_checkpoint
from opcd.runtime.errors import UserError

CONFIG = {
    "seed_everything": 0,
    "trainer": {"precision": "32-true"},
    "model": {"temperature": 1.0, "student": {"name": "a", "trust_remote_code": False}, "lr_scheduler": None},
    "data": {"train": "rows.jsonl"},
}
WHOLE = {
    "state_dict": {"a": torch.ones(100)},
    "pytorch-lightning_version": "2.5.0",
    "epoch": 0,
    "global_step": 3,
    "loops": {},
    "callbacks": {},
    "optimizer_states": [],
    "lr_schedulers": [],
}


class Code:
    """Runs where a pickle of it is loaded."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def cut(path: Path) -> None:
    torch.save(WHOLE, path)
    path.write_bytes(path.read_bytes()[:400])


BAD = {
    "cut": (cut, "cut or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "it is empty"),
    "random": (lambda path: path.write_bytes(bytes(range(256)) * 9), "not in the format of torch.save"),
    "text": (lambda path: path.write_text("hello\n"), "not in the format of torch.save"),
    "zip": (lambda path: path.write_bytes(b"PK\3\4" + bytes(500)), "cut or damaged"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps({"state_dict": {}})), "not in the format of torch.save"),
    "pickled code": (lambda path: path.write_bytes(pickle.dumps(Code())), "not in the format of torch.save"),
    "code": (lambda path: torch.save(WHOLE | {"more": Code()}, path), "which could run code"),
    "old": (lambda path: torch.save(WHOLE, path, _use_new_zipfile_serialization=False), "not in the format"),
    "list": (lambda path: torch.save([1, 2], path), "holds a list"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "holds a Tensor"),
    "without weights": (lambda path: torch.save({"epoch": 1}, path), "it has no state_dict"),
    "other weights": (lambda path: torch.save(WHOLE | {"state_dict": {"a": 1}}, path), "'a' of its state_dict"),
    "numbered weights": (lambda path: torch.save(WHOLE | {"state_dict": {1: torch.ones(1)}}, path), "1 of its state"),
    "hyper list": (lambda path: torch.save(WHOLE | {"hyper_parameters": [1]}, path), "hyper_parameters is a list"),
    "hyper text": (lambda path: torch.save(WHOLE | {"hyper_parameters": "x"}, path), "hyper_parameters is a str"),
    "loops": (lambda path: torch.save(WHOLE | {"loops": 3}, path), "loops is a int"),
    "step": (lambda path: torch.save(WHOLE | {"global_step": "3"}, path), "global_step is a str"),
    "config": (lambda path: torch.save(WHOLE | {"config": {"model": 3}}, path), "the config in it"),
}


@pytest.mark.case("A3")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", BAD)
def test_what_is_no_checkpoint_is_named(name, training, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = BAD[name]
    path = tmp_path / "file.ckpt"
    make(path)
    with pytest.raises(BrokenCheckpoint, match=message) as raised:
        check_checkpoint(path, CONFIG, training)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "it-ran").exists()


@pytest.mark.case("A3")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
def test_weights_alone_are_enough_to_answer_and_not_to_train(tmp_path):
    path = tmp_path / "weights.ckpt"
    torch.save({"state_dict": WHOLE["state_dict"]}, path)
    assert check_checkpoint(path, CONFIG, training=False) == {}
    with pytest.raises(
        BrokenCheckpoint, match="that training can resume from: it has no pytorch-lightning_version, ep"
    ):
        check_checkpoint(path, CONFIG, training=True)


@pytest.mark.case("A2")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ({"temperature": 2.0}, "model.temperature"),
        (
            {"temperature": 1.0, "student": {"name": "b", "trust_remote_code": True}},
            r"model.student.name, model.*code",
        ),
        ({"student": "b"}, "model.student"),
        ({"student": {"name": {"a": 1}}}, "model.student.name"),
        ({"lr_scheduler": {"class_path": "evil.Scheduler"}}, "model.lr_scheduler"),
        ({"_class_path": "evil.Model", "temperature": 1.0}, "model._class_path"),
        ({"nothing": None}, "model.nothing"),
        ({"temperature": torch.ones(2)}, "model.temperature"),
        ({"temperature": True}, "model.temperature"),
        ({7: 1}, "model.7"),
    ],
)
def test_hyper_parameters_are_compared_and_never_taken(asked, keys, training, tmp_path):
    path = tmp_path / "file.ckpt"
    torch.save(WHOLE | {"hyper_parameters": asked}, path)
    with pytest.raises(UserError, match=rf"file.ckpt: its hyper_parameters differ from the config at {keys}"):
        check_checkpoint(path, CONFIG, training)
    torch.save(WHOLE | {"hyper_parameters": {"_instantiator": "x", "temperature": 1.0, "student": {"name": "a"}}}, path)
    check_checkpoint(path, CONFIG, training)


@pytest.mark.case("A2")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
def test_an_adapter_is_not_put_over_another_base(tmp_path):
    path = tmp_path / "file.ckpt"
    then = CONFIG | {"model": CONFIG["model"] | {"adapter": {"rank": 4}}}
    torch.save(WHOLE | {"config": then}, path)
    check_checkpoint(path, then, training=False)
    now = then | {"model": then["model"] | {"student": {"name": "b"}}}
    with pytest.raises(UserError, match=r"saved with another student; these keys differ: model.student.name"):
        check_checkpoint(path, now, training=False)
    with pytest.raises(UserError, match=r"these keys differ: model.adapter, model.student"):
        check_checkpoint(path, CONFIG, training=False)


@pytest.mark.case("A2", "A3")
@pytest.mark.filterwarnings("ignore:.*has no manifest")
@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_every_command_asks_the_config_alone(command, opcd, rows, context, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text("import os\nos.mkdir('it-ran')\nclass Loss: ...\n")
    path = tmp_path / "file.ckpt"
    split = "train" if command == "fit" else "val" if command == "validate" else command
    words = (command, f"--data.{split}", rows, "--data.context", context, "--ckpt_path", path)
    asked = {"temperature": 2.0, "student": {"name": "elsewhere"}, "loss": {"class_path": "evil.Loss"}}
    torch.save(WHOLE | {"hyper_parameters": asked}, path)
    code, text = opcd(*words)
    assert code == 2 and "at model.temperature, model.student.name, model.loss.class_path" in text
    path.write_bytes(b"PK nothing")
    code, text = opcd(*words)
    assert code == 2 and f"{path} cannot be loaded as a checkpoint: it is cut" in text
    assert not (tmp_path / "it-ran").exists() and not list((tmp_path / "runs").glob("version_*"))
