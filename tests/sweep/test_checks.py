"""Every arm is parsed and built before anything runs."""

import pytest

from opcd.cli.fit import fit_parser
from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.sweep_plan import Base
from tests.helpers.paths import QUICKSTART


@pytest.fixture(scope="module")
def parser():
    return fit_parser()


@pytest.fixture
def base(tiny, rows, context):
    return Base([str(QUICKSTART)], {"model.student.name": tiny, "data.train": str(rows), "data.context": str(context)})


@pytest.fixture
def checker(parser, base):
    return ConfigChecker(parser, base)


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("model.los", "model.loss"),
        ("lr", "model.optimizer.init_args.lr"),
        ("trainer.max_step", "trainer.max_steps"),
        ("model.temp", "model.temperature"),  # a beginning, which argparse alone would take
        ("data.student", None),
    ],
)
def test_an_axis_that_is_no_key_is_named_with_the_nearest(checker, key, near):
    with pytest.raises(UserError, match=f"axes: '{key}' is no config key" + (f"; did you mean {near}" if near else "")):
        checker.check_keys([key], "axes")


def test_keys_inside_of_classes_and_mappings(checker):
    inside = ["model.optimizer.init_args.lr", "model.student.chat_template_kwargs.enable_thinking", "ckpt_path"]
    checker.check_keys([*inside, "model.loss.init_args.k", "seed_everything", "model.loss"], "axes")
    with pytest.raises(UserError, match="is set by the sweep itself"):
        checker.check_keys(["trainer.default_root_dir"], "base.set")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.temperature": "warm"}, "arm x: .*model.temperature"),
        ({"model.loss": "JSDD"}, "arm x: .*JSDD"),
        ({"model.loss": {"class_path": "JSD", "init_args": {"beta": 1.0}}}, "arm x: .*0 < beta < 1"),
        ({"model.optimizer.init_args.lrr": 1.0}, "arm x: .*Option 'lrr' is not accepted"),
        ({"data.train": "nowhere.jsonl"}, "arm x: data.train: no file"),
        ({"data.context": "nowhere.txt"}, "arm x: data.context: no file"),
        ({"model.student.name": "nowhere"}, "arm x: .*nowhere"),
        ({"model.teacher": "BaseTeacher"}, "arm x: model.teacher: BaseTeacher is the student without its adapter"),
        ({"trainer.precision": "16-true"}, "arm x: trainer.precision: float16 needs loss scaling"),
        ({"model.rollout": "RecordedRollout"}, "arm x: .*no `response`, but model.rollout is RecordedRollout"),
    ],
)
def test_a_wrong_arm_is_refused(checker, settings, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        checker.resolve(settings, "arm x")


def test_an_accelerator_of_another_machine_is_none_of_the_checks(checker):
    assert checker.resolve({"trainer.accelerator": "mps"}, "arm x")["trainer"]["accelerator"] == "mps"


def test_a_resolved_config_is_the_whole_of_it(checker):
    config = checker.resolve({"model.loss": "opcd.losses.JSD", "seed_everything": 7}, "arm x")
    assert config["model"]["loss"] == {"class_path": "opcd.losses.JSD", "init_args": {"beta": 0.5}}
    assert config["seed_everything"] == 7 and config["trainer"]["max_steps"] == 36
    assert "default_root_dir" not in config["trainer"]


def test_a_missing_file_of_the_base_and_a_wrong_base(parser, base):
    with pytest.raises(UserError, match=r"base.config: no file .*quickstat.yaml; did you mean quickstart.yaml"):
        ConfigChecker(parser, Base([str(QUICKSTART).replace("quickstart", "quickstat")], base.set))
    with pytest.raises(UserError, match=r"base: .*trainer.max_steps"):
        ConfigChecker(parser, Base(base.config, base.set | {"trainer.max_steps": "two"}))
    with pytest.raises(UserError, match=r"base.set: 'model.los' is no config key; did you mean model.loss"):
        ConfigChecker(parser, Base(base.config, base.set | {"model.los": "JSD"}))


def test_changed_keys():
    old, new = {"a": {"b": 1, "c": [1]}, "d": None}, {"a": {"b": 2, "c": [1]}, "e": 1}
    assert changed_keys(old, new) == ["a.b", "d", "e"]
    assert changed_keys(old, old) == []


def test_a_setting_takes_the_place_of_what_the_base_says_below_it(parser, base):
    name = {"model.teacher.init_args.model.name": "smollm2-135m", "model.temperature": 0.5}
    checker = ConfigChecker(parser, Base(base.config, base.set | name))
    words = checker.words({"model.teacher": "SelfTeacher"})
    assert words[-4:] == ["--model.temperature", "0.5", "--model.teacher", "SelfTeacher"]
    assert not any("model.teacher." in word for word in words)
    assert checker.resolve({"model.teacher": "SelfTeacher"}, "arm")["model"]["teacher"]["class_path"].endswith(
        "SelfTeacher"
    )
    below = checker.words({"model.teacher.init_args.model.dtype": "float32"})
    assert "--model.teacher.init_args.model.name" in below
