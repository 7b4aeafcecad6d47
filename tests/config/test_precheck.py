"""Mistakes on the command line and in recipes: told with what was probably meant."""

import sys
from pathlib import Path

import pytest
import yaml

from opcd.cli.fit import fit_parser
from opcd.config.precheck import checked
from opcd.config.signatures import inner_keys, options
from tests.helpers.paths import QUICKSTART, ROOT
from tests.helpers.rows import write_rows

RECIPE = str(QUICKSTART)
ROWS = str(ROOT / "configs" / "data" / "quickstart_train.jsonl")


def test_the_signatures_have_the_keys_of_the_parser():
    """No second list of keys: what is read from source text is what Lightning's parser has."""
    parser = fit_parser()
    known = {action.dest for action in parser._actions} - {"help", "config", "print_config"}
    known = {key for key in known if not key.endswith(".help") and not key.startswith(("data.student", "data.teacher"))}
    read = options("fit")
    inside = {key for key in read if any(key.startswith(f"{above}.") for above in known - set(read))}
    assert known - set(read) == set() and inside == set()
    missing = {key for key in set(read) - known if not read[key]}
    # They may be null: one action for all of it.
    assert {key.rpartition(".")[0] for key in missing} <= {"data.anchors", "model.adapter"}


def test_the_keys_inside_of_defaults_are_taken(opcd, rows, capsys):
    """Each that a message may name is one that the parser takes."""
    for key in ("model.optimizer.lr", "model.rollout.sampling.max_new_tokens", "model.teacher.model.name"):
        assert key in inner_keys()
    words = ["--model.optimizer.lr", "3e-4", "--model.rollout.sampling.max_new_tokens", "7"]
    with pytest.raises(SystemExit):
        opcd("fit", "--data.train", rows, *words, "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)["model"]
    assert config["optimizer"]["init_args"]["lr"] == 3e-4
    assert config["rollout"]["init_args"]["sampling"]["max_new_tokens"] == 7


@pytest.mark.case("C16")
def test_the_default_optimizer_is_written_out(opcd, rows, capsys):
    with pytest.raises(SystemExit):
        opcd("fit", "--data.train", rows, "--print_config")
    config = yaml.safe_load(capsys.readouterr().out)
    init_args = config["model"]["optimizer"]["init_args"]
    assert config["model"]["optimizer"]["class_path"] == "torch.optim.AdamW"
    assert (init_args["lr"], init_args["weight_decay"], init_args["fused"]) == (5e-6, 0.01, True)


@pytest.mark.case("C16")
def test_another_optimizer_takes_no_weight_decay_over(opcd, rows, capsys):
    with pytest.raises(SystemExit):
        opcd("fit", "--data.train", rows, "--model.optimizer", "torch.optim.SGD", "--print_config")
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["init_args"]["weight_decay"] == 0


@pytest.mark.case("C10")
@pytest.mark.case("C11")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["fit", "--model.lr", "1e-5"], "no option --model.lr; did you mean --model.optimizer.lr?"),
        (["fit", "--lr=1e-5"], "no option --lr; did you mean --model.optimizer.lr?"),
        (["fit", "--learning_rate", "1e-5"], "did you mean --model.optimizer.lr?"),
        (["fit", "--data.batchsize", "4"], "no option --data.batchsize; did you mean --data.batch_size?"),
        (["fit", "--data.batch-size=4"], "did you mean --data.batch_size?"),
        (["fit", "--confg", RECIPE], "no option --confg; did you mean --config?"),
        (["fit", "-config", RECIPE], "no option -config; did you mean --config?"),
        (["fit", "recipe.yaml"], "did you mean --config recipe.yaml?"),
        (["fit", "--config", RECIPE, "lora.yaml"], "did you mean --config lora.yaml?"),
        (["fit", "--max_steps", "5"], "no option --max_steps; did you mean --trainer.max_steps?"),
        (["fit", "--epochs", "5"], "did you mean --trainer.max_epochs?"),
        (["fit", "data.batch_size=4"], "did you mean --data.batch_size=4?"),
        (["fit", "--model.adapter.rnk", "4"], "did you mean --model.adapter.rank?"),
        (["fit", "--model.max_new_tokens", "4"], "max_new_tokens?"),
        (["validate", "--trainer.device", "1"], "did you mean --trainer.devices?"),
        (["train", "--config", RECIPE], "no command train; did you mean fit?"),
        (["eval"], "no command eval; did you mean evaluate?"),
        (["Fit"], "no command Fit; did you mean fit?"),
        (["help"], "did you mean --help?"),
        (["recipe.yaml"], "no command recipe.yaml; did you mean opcd fit --config recipe.yaml?"),
        (["--config", "recipe.yaml"], "an option comes after a command, as in opcd fit --config"),
        (["--vresion"], "did you mean --version?"),
        (["zzz"], "no command zzz; there are fit, validate"),
        (["report", "--ot", "x.html", "run"], "no option --ot; did you mean --out?"),
        (["show", "run", "--pag", "x"], "no option --pag; did you mean --page?"),
        (["init", "--knd", "facts"], "no option --knd; did you mean --kind?"),
        (["init", "a", "b"], "b is a word too many"),
        (["completion", "bsh"], "bash"),
        (["fit"], "`opcd init FOLDER` makes a recipe"),
        (["predict", "--model.temperature", "1"], "data.predict is not set; `predict` needs it"),
        (["fit", "--config"], "--config: expected one argument"),
        (["fit", "--config", "quickstrt.yaml"], "quickstrt.yaml does not exist"),
        (["fit", "--config", RECIPE, "--data.train", "nope.jsonl"], "data.train: no file"),
        (["fit", "--config", RECIPE, "--data.context", "nope.txt"], "opcd queries --context nope.txt --out FOLDER"),
        (["fit", "--config", RECIPE, "--data.train", ROWS, "--data.context", "nope.txt"], "data.context: no file"),
        (["fit", "--config", RECIPE, "--data.train", '"no.jsonl'], "data.train: no file"),  # no YAML, but a name
    ],
    ids=lambda value: " ".join(value)[:50].replace(str(ROOT), "") if isinstance(value, list) else "",
)
def test_what_was_meant_is_told(opcd, words, told, monkeypatch):
    monkeypatch.setattr("opcd.cli.fit.run", None)  # nothing is parsed a second time
    code, text = opcd(*words)
    assert code == 2 and told in text and text.count("opcd: error: ") == 1, text


@pytest.mark.case("C11")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "--tsks", "ifeval"], "did you mean --tasks?"),
        (["chat", "smollm2-135m", "--contxt", "x"], "did you mean --context?"),
        (["experience", "--stps", "3"], "did you mean --steps?"),
        (["export", "run", "--to", "hf", "--ot", "x"], "did you mean --out?"),
    ],
)
def test_the_other_commands_tell_the_nearest_option_too(opcd, words, told):
    code, text = opcd(*words)
    assert code == 2 and told in text and len(text.splitlines()) == 1, text


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("model:\n  student: {name: a\n  x: 1\n", "not valid YAML"),
        ("model:\n  studnt: {name: a}\n", "no key model.studnt.name; did you mean model.student.name?"),
        ("model: {lr: 1.0e-5}\n", "no key model.lr; did you mean model.optimizer.lr?"),
        ("data: {batchsize: 4}\n", "no key data.batchsize; did you mean data.batch_size?"),
        ("trainer: {max_stepss: 4}\n", "did you mean trainer.max_steps?"),
        ("max_steps: 4\n", "did you mean trainer.max_steps?"),
        ("model: {student: smollm2-135m}\n", "did you mean model.student: {name: smollm2-135m}?"),
        ("- a\n", "needs keys with values"),
        ("just a text\n", "needs keys with values"),
        ("", "needs keys with values"),
    ],
)
def test_a_mistake_in_a_recipe_names_the_file(tmp_path, recipe, told):
    from opcd.runtime.errors import UserError

    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    with pytest.raises(UserError) as raised:
        checked("fit", ["--config", str(file)])
    assert told in str(raised.value) and str(file) in str(raised.value)


@pytest.mark.case("C12")
@pytest.mark.parametrize(
    ("words", "full"),
    [
        (["--model.student", "a/b"], ["--model.student.name", "a/b"]),
        (["--model.student=a/b"], ["--model.student.name=a/b"]),
        (["--model.student", "{name: a}"], ["--model.student", "{name: a}"]),
        (["--model.teacher.name", "a/b"], ["--model.teacher.init_args.model.name", "a/b"]),
        (["--model.teacher.name=a/b"], ["--model.teacher.init_args.model.name=a/b"]),
        (["--model.teacher.dtype", "float32"], ["--model.teacher.init_args.model.dtype", "float32"]),
        (["--model.teacher.model", "a/b"], ["--model.teacher.init_args.model.name", "a/b"]),
        (["--model.teacher.model", "{name: a/b}"], ["--model.teacher.model", "{name: a/b}"]),
        (["--model.teacher.init_args.model", "null"], ["--model.teacher.init_args.model", "null"]),
        (["--model.teacher.model.name", "a/b"], ["--model.teacher.model.name", "a/b"]),
        (
            ["--model.teacher", "ServedTeacher", "--model.teacher.name", "a/b"],
            ["--model.teacher", "ServedTeacher", "--model.teacher.name", "a/b"],
        ),
    ],
)
def test_short_forms_of_a_models_name(rows, words, full):
    data = ["--data.train", str(rows)]
    assert checked("fit", [*data, *words]) == [*data, *full]


@pytest.mark.case("C12")
def test_the_short_forms_reach_the_config(opcd, rows, capsys):
    with pytest.raises(SystemExit):
        opcd("fit", "--data.train", rows, "--model.student", "a/b", "--model.teacher.name", "c/d", "--print_config")
    model = yaml.safe_load(capsys.readouterr().out)["model"]
    assert model["student"]["name"] == "a/b" and model["teacher"]["init_args"]["model"]["name"] == "c/d"


def test_wrong_rows_of_a_small_file_are_told_at_once_unless_they_are_skipped(tmp_path):
    from opcd.runtime.errors import UserError

    file = write_rows(tmp_path / "rows.jsonl", [{"query": "a"}, {"qery": "b"}])
    with pytest.raises(UserError, match=r"rows.jsonl:2: unknown key 'qery'; did you mean query\?"):
        checked("fit", ["--data.train", str(file)])
    assert checked("fit", ["--data.train", str(file), "--data.on_bad_row", "skip"])


def test_without_the_sources_nothing_is_refused(monkeypatch):
    monkeypatch.setattr("opcd.config.precheck.options", lambda command: {}[command])
    assert checked("fit", ["--data.batchsize", "4"]) == ["--data.batchsize", "4"]


def test_nothing_that_a_value_names_is_imported(tmp_path, rows, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "somebodys.py").write_text("raise SystemExit('imported')\n")
    recipe = tmp_path / "recipe.yaml"
    loss = {"class_path": "somebodys.Loss"}
    recipe.write_text(yaml.safe_dump({"model": {"loss": loss}, "data": {"train": str(rows)}}))
    assert checked("fit", ["--config", str(recipe), "--model.optimizer", "somebodys.Adam"])
    assert "somebodys" not in sys.modules


class TestPathsInARecipe:
    """From the working folder, or else beside the recipe."""

    @pytest.fixture
    def recipe(self, tmp_path) -> Path:
        folder = tmp_path / "elsewhere"
        (folder / "rows").mkdir(parents=True)
        write_rows(folder / "rows" / "train.jsonl", [{"query": "Who?"}])
        (folder / "context.txt").write_text("Odalys.")
        file = folder / "recipe.yaml"
        file.write_text(yaml.safe_dump({"data": {"train": "rows/train.jsonl", "context": "context.txt"}}))
        return file

    @pytest.mark.case("C14")
    def test_beside_the_recipe_where_the_working_folder_has_none(self, opcd, recipe, tmp_path, monkeypatch, capsys):
        here = tmp_path / "here"
        here.mkdir()
        monkeypatch.chdir(here)
        with pytest.raises(SystemExit):
            opcd("fit", "--config", recipe, "--print_config")
        captured = capsys.readouterr()
        data = yaml.safe_load(captured.out)["data"]
        assert data["train"] == str(recipe.parent / "rows" / "train.jsonl")
        assert data["context"] == str(recipe.parent / "context.txt") and captured.err == ""
        monkeypatch.chdir(tmp_path)  # a path below the working folder stays relative
        with pytest.raises(SystemExit):
            opcd("fit", "--config", "elsewhere/recipe.yaml", "--print_config")
        assert yaml.safe_load(capsys.readouterr().out)["data"]["context"] == "elsewhere/context.txt"

    @pytest.mark.case("C14")
    def test_the_working_folder_comes_first_and_that_is_said(self, opcd, recipe, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "context.txt").write_text("Another.")
        with pytest.raises(SystemExit):
            opcd("fit", "--config", recipe, "--print_config")
        captured = capsys.readouterr()
        assert yaml.safe_load(captured.out)["data"]["context"] == "context.txt"
        assert captured.err.count(f"context.txt is taken from the working folder {tmp_path}") == 1

    @pytest.mark.case("C14")
    def test_a_path_that_is_in_neither_names_both(self, opcd, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (recipe.parent / "context.txt").unlink()
        code, text = opcd("fit", "--config", recipe)
        assert code == 2, text
        assert f"data.context: no file {tmp_path}/context.txt, nor {recipe.parent}/context.txt" in text

    @pytest.mark.case("C14")
    def test_what_is_no_path_and_outputs_stay_as_they_are(self, tmp_path):
        from opcd.runtime.files.recipe_paths import paths_taken

        folder, here = tmp_path / "recipes", tmp_path / "here"
        for name in ("JSD", "opcd/losses", "out/runs", "data"):
            (folder / name).mkdir(parents=True)
        (folder / "data" / "a.jsonl").touch()
        here.mkdir()
        config = {
            "model": {"loss": {"class_path": "opcd/losses"}, "student": {"name": "org/name"}, "other": "JSD"},
            "trainer": {"default_root_dir": "out/runs", "callbacks": [{"init_args": {"data": {"x": "data/a.jsonl"}}}]},
            "data": {"train": "data/*.jsonl", "template": "{context}\n\n{query}"},
        }
        taken = paths_taken(config, folder, here)
        assert taken["model"] == config["model"] and taken["trainer"]["default_root_dir"] == "out/runs"
        assert taken["trainer"]["callbacks"][0]["init_args"]["data"]["x"] == str(folder / "data/a.jsonl")
        assert taken["data"] == {"train": str(folder / "data/*.jsonl"), "template": config["data"]["template"]}

    @pytest.mark.case("C14")
    def test_a_sweeps_file_too(self, recipe, tmp_path, monkeypatch):
        from opcd.sweep.sweep_plan import read_sweep

        sweep = recipe.parent / "sweep.yaml"
        sweep.write_text(yaml.safe_dump({"base": {"config": ["recipe.yaml"]}, "axes": {"data.batch_size": [1, 2]}}))
        monkeypatch.chdir(tmp_path)
        assert read_sweep(sweep).base.config == ["elsewhere/recipe.yaml"]


@pytest.mark.case("C13")
def test_a_run_that_is_not_there_is_told_with_those_that_are(opcd, rows, context, tmp_path, monkeypatch):
    data = ("--data.train", rows, "--data.context", context, "--trainer.max_steps", 1)
    for number in (0, 1):
        (tmp_path / "runs" / f"version_{number}").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for words in (
        ("chat", "runs/version_7"),
        ("chat", "runs/version_7/student"),
        ("report", "runs/version_7"),
        ("fit", *data, "--trainer.default_root_dir", "new", "--model.student", "runs/version_7"),
    ):
        code, text = opcd(*words)
        assert code == 2 and "runs has version_0, version_1" in text, text
