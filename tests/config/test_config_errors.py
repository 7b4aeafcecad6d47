"""What jsonargparse refuses is told in one line that names the key, the mistake and the choices."""

import sys

import pytest


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--model.loss", "JDS"], ["model.loss: no class JDS; did you mean JSD?", "my_file.JDS"]),
        (["--model.loss", "JSD", "--model.loss.bta", "1"], ["opcd.losses.JSD has no option bta; did you mean beta?"]),
        (["--model.loss", "opcd.losses.JDS"], ["model.loss: module 'opcd.losses' has no attribute 'JDS'"]),
        (
            ["--model.loss", "torch.nn.Linear"],
            ["does not correspond to a subclass of Loss", "torch.nn.Linear"],
        ),
        (["--model.loss", "mine.Loss"], ["model.loss: No module named 'mine'"]),
        (["--model.optimizer", "mine.Adam"], ["model.optimizer: No module named 'mine'", "mine.Adam"]),
        (["--model.rollout", "StudentRolout"], ["model.rollout: no class StudentRolout; did you mean StudentRollout?"]),
        (["--model.optimizer", "AdmW"], ["model.optimizer: no class AdmW; did you mean AdamW?"]),
        (["--trainer.logger", "WandLogger"], ["trainer.logger: no class WandLogger; did you mean WandbLogger?"]),
        (["--trainer.callbacks+=AnswerSample"], ["trainer.callbacks: no class AnswerSample", "AnswerSamples?"]),
        (
            ["--trainer.callbacks+=AnswerSamples", "--trainer.callbacks.querys", "3"],
            ["trainer.callbacks: opcd.callbacks.AnswerSamples has no option querys; did you mean queries?"],
        ),
        (["--model.teacher.init_args.model.nam", "x"], ["ModelConfig has no option nam; did you mean name?"]),
        (["--model.rollout", "JSD"], ["model.rollout: no class JSD; there are GameRollout, ", "StudentRollout"]),
        (
            ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lrr", "1"],
            ["AdamW has no option lrr; did you mean lr?"],
        ),
        (
            ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", "x"],
            ["optimizer.lr: Expected a <class 'float'>"],
        ),
        (["--model.loss", "TopK", "--model.loss.k", "x"], ["model.loss.k: Expected a <class 'int'>. Got value: x"]),
        (["--trainer.precision", "8"], ["trainer.precision: Expected a typing.Literal[64, 32, 16]; ", "value: 8"]),
        (["--trainer.max_steps", "x"], ["trainer.max_steps: Expected a <class 'int'>. Got value: x"]),
        (["--data.batch_size", "many"], ["data.batch_size: Expected a <class 'int'>. Got value: many"]),
    ],
)
def test_one_line_says_what_is_wrong_and_what_there_is(opcd, rows, words, told):
    code, text = opcd("fit", "--data.train", rows, *words)
    assert code == 2 and len(text.splitlines()) == 1
    assert all(part in text for part in told), text


@pytest.mark.parametrize("recipe", ["data: {batch_size: eight}\n", "model: {reduction: tokens}\n"])
def test_a_wrong_value_in_a_recipe_names_the_file(opcd, rows, tmp_path, recipe):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    code, text = opcd("fit", "--data.train", rows, "--config", file)
    key = recipe.replace(": {", ".").split(":")[0]
    assert code == 2 and len(text.splitlines()) == 1 and f"{file}: {key}: Expected a " in text, text


def test_a_value_that_does_not_fit_its_class_hides_behind_no_other_class(opcd, rows):
    code, text = opcd("fit", "--data.train", rows, "--model.loss", "JSD", "--model.loss.beta", "x")
    assert code == 2 and "Expected a <class 'float'>. Got value: x" in text and "SampledReverseKL" not in text


def test_a_class_is_found_in_the_current_folder(opcd, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "a_loss_beside_the_config.py").write_text(
        "from opcd.losses import ReverseKL\n\n\nclass Mine(ReverseKL):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    code, text = opcd(
        "fit", "--data.train", rows, "--model.loss", "a_loss_beside_the_config.Mine", "--model.loss.factor", "2"
    )
    assert code == 2 and "a_loss_beside_the_config.Mine has no option factor; there are none" in text
