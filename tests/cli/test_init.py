"""`opcd init`: what it writes trains, and nothing is overwritten."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from opcd.tasks.matching import right
from tests.helpers.paths import ROOT

FILES = ["context.txt", "recipe.yaml", "train.jsonl", "val.jsonl"]


@pytest.mark.parametrize("kind", ["facts", "manner"])
def test_what_it_writes_trains_as_it_is(opcd, tiny, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    code, text = opcd("init", "my first", "--kind", kind)
    assert code == 0 and "cd 'my first'" in text, text
    assert sorted(file.name for file in Path("my first").iterdir()) == FILES
    monkeypatch.chdir("my first")
    code, text = opcd("fit", "--config", "recipe.yaml", "--model.student.name", tiny, "--trainer.max_steps", 1)
    assert code == 0, text
    samples = [json.loads(line) for line in Path("runs/version_0/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * len(Path("val.jsonl").read_text().splitlines())
    assert (Path("runs/version_0/student") / "config.json").is_file()


def test_its_questions_ask_for_what_the_context_says(opcd, tmp_path):
    assert opcd("init", tmp_path)[0] == 0
    context = (tmp_path / "context.txt").read_text()
    train, val = ([json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in FILES[2:])
    assert all(right({**row, "answer": context}) for row in [*train, *val])
    assert {row["reference"] for row in val} == {row["reference"] for row in train}
    assert not {row["query"] for row in val} & {row["query"] for row in train}


def test_questions_of_a_manner_are_kept_apart(opcd, tmp_path):
    assert opcd("init", tmp_path, "--kind", "manner")[0] == 0
    train, val = (
        [json.loads(line)["query"] for line in (tmp_path / name).read_text().splitlines()] for name in FILES[2:]
    )
    assert len({*train, *val}) == len(train) + len(val)


@pytest.mark.parametrize("kind", ["facts", "manner"])
def test_the_recipe_says_what_each_key_does(opcd, tmp_path, kind):
    assert opcd("init", tmp_path, "--kind", kind)[0] == 0
    lines = (tmp_path / "recipe.yaml").read_text().splitlines()
    config = yaml.safe_load("\n".join(lines))
    for key in [*config["data"], *config["trainer"], *(set(config["model"]) - {"student", "teacher", "optimizer"})]:
        assert any(line.strip().startswith(f"{key}:") and " # " in line for line in lines), key


@pytest.mark.parametrize("there", ["notes.txt", "recipe.yaml"])
def test_nothing_is_overwritten(opcd, tmp_path, there):
    (tmp_path / there).write_text("mine")
    code, text = opcd("init", tmp_path)
    assert code == 2 and f"{tmp_path} is not empty (it holds {there})" in text
    assert [file.name for file in tmp_path.iterdir()] == [there] and (tmp_path / there).read_text() == "mine"


def test_a_folder_that_is_new_to_git_is_empty(opcd, tmp_path):
    (tmp_path / ".git").mkdir()
    assert opcd("init", tmp_path)[0] == 0


def test_a_file_is_no_folder(opcd, tmp_path):
    (tmp_path / "file").write_text("")
    code, text = opcd("init", tmp_path / "file")
    assert code == 2 and "FOLDER: cannot make" in text


def test_a_wheel_holds_every_file_of_the_package(tmp_path):
    """What a command reads beside its code must be named in pyproject.toml."""
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    (tmp_path / "opcd").symlink_to(ROOT / "opcd")
    for name in ("README.md", "LICENSE"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=True)
    wheel = zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1])
    there = {str(file.relative_to(ROOT)) for file in (ROOT / "opcd").rglob("*.*") if "__pycache__" not in file.parts}
    assert there <= set(wheel.namelist())
