"""What shells and editors are told: options by prefix, values of an option, recipes that are whole and that are not."""

import copy
import subprocess
from contextlib import redirect_stdout
from functools import reduce

import pytest
import yaml
from jsonschema import Draft202012Validator

from opcd.cli import COMMANDS, TRAINER
from opcd.cli.completion import main, recipe_schema
from tests.helpers.paths import ROOT

RECIPES = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("opcd/cli/starter/*/recipe.yaml")]
RECIPES = [file for file in RECIPES if not file.name.startswith("experience_")]


@pytest.fixture(scope="module")
def schema():
    return Draft202012Validator(recipe_schema())


@pytest.fixture(scope="module")
def bash(tmp_path_factory):
    """Completes the last of the words as bash does."""
    script = tmp_path_factory.mktemp("bash") / "opcd.bash"
    with script.open("w") as stream, redirect_stdout(stream):
        assert main(["bash"]) == 0

    def complete(*words: str) -> list[str]:
        typed = " ".join(f"'{word}'" for word in ("opcd", *words))
        code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _shtab_opcd; echo ${{COMPREPLY[@]}}"
        return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True).stdout.split()

    return complete


def test_commands_options_and_values_complete_in_bash(bash):
    assert set(bash("")) >= {*COMMANDS, *TRAINER}
    assert bash("ex") == ["experience", "export"]
    assert set(bash("fit", "--model.los")) == {"--model.loss", "--model.loss.help"}
    assert bash("fit", "--trainer.precision", "bf16-m") == ["bf16-mixed"]
    assert bash("predict", "--model.loss", "J") == ["JSD"]
    assert bash("fit", "--model.gradient_checkpointing", "t") == ["true"]
    assert bash("export", "--to", "g") == ["gguf"]
    assert bash("evaluate", "--gre") == ["--greedy"]
    assert "--data.teacher" not in bash("fit", "--data.")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_all_recipes_are_whole(schema, file):
    assert not [error.message for error in schema.iter_errors(yaml.safe_load(file.read_text()))]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.los", "JSD"),
        ("model.temperature", "warm"),
        ("model.loss", {"class_path": "JSD", "init_args": {"bta": 0.5}}),
        ("model.teacher.class_path", "opcd.modules.StudentRollout"),
        ("trainer.max_stepz", 3),
        ("data.placement", "nowhere"),
    ],
)
def test_a_mistake_is_marked(schema, key, value):
    recipe = yaml.safe_load((ROOT / "configs/cross_size.yaml").read_text())
    assert schema.is_valid(recipe)
    assert not schema.is_valid(_with(recipe, key, value))


def test_short_names_and_classes_of_ones_own_pass(schema):
    recipe = yaml.safe_load((ROOT / "configs/cross_size.yaml").read_text())
    named = [{"class_path": "JSD", "init_args": {"beta": 0.5}}, {"class_path": "mine.Loss", "init_args": {"a": 1}}]
    for loss in ("JSD", *named):
        assert schema.is_valid(_with(recipe, "model.loss", loss)), loss


def _with(recipe, key, value):
    changed = copy.deepcopy(recipe)
    *above, last = key.split(".")
    reduce(dict.__getitem__, above, changed)[last] = value
    return changed


def test_zsh_is_told_what_the_fields_of_a_class_are_for(opcd):
    code, text = opcd("completion", "zsh")
    assert code == 0 and "Attention implementation of transformers" in text
