"""Evaluation inside training: what it leaves, and that training does not notice it."""

import copy
import csv
import json
import random

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from opcd.evaluation import Evaluation, Evaluator
from opcd.evaluation.intervals import wilson
from opcd.models import ModelConfig
from opcd.modules.student import Student
from opcd.results.run_tables import evaluations, read_runs
from tests.helpers.ranks import RANKS, run
from tests.helpers.rows import write_rows
from tests.helpers.task_rows import ifeval_rows, math_rows


@pytest.fixture
def words(tiny, rows, context, tmp_path):
    """Training on sampled answers of four tokens, and an overlay that evaluates both tasks."""
    files = {
        "dapo_math": str(write_rows(tmp_path / "math.jsonl", math_rows())),
        "ifeval": str(write_rows(tmp_path / "ifeval.jsonl", ifeval_rows())),
    }

    def make(steps: int, **callback: object) -> tuple[object, ...]:
        evaluation = {"tasks": ["dapo_math", "ifeval"], "data": files, "limit": 2, "max_new_tokens": 4}
        evaluation |= callback.pop("evaluation", {})
        lm_eval = {"class_path": "opcd.callbacks.LMEval", "init_args": {"evaluation": evaluation, **callback}}
        (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [lm_eval]}}))
        return (
            *("fit", "--model.student.name", tiny, "--model.rollout.init_args.sampling.max_new_tokens", 4),
            *("--data.train", rows, "--data.context", context, "--data.batch_size", 2, "--trainer.max_steps", steps),
            *("--model.eval_sampling.max_new_tokens", 2, "--trainer.default_root_dir", tmp_path / "runs"),
            *(("--config", tmp_path / "overlay.yaml") if callback else ()),
        )

    return make


def test_what_an_evaluation_leaves(opcd, words, tmp_path, caplog):
    checkpoint = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"monitor": "eval/ifeval/response_tokens", "mode": "max", "every_n_train_steps": 2},
    }
    arguments = words(5, every_n_steps=2, at_start=True)
    overlay = yaml.safe_load((tmp_path / "overlay.yaml").read_text())
    overlay["trainer"]["callbacks"].append(checkpoint)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    code, text = opcd(*arguments, "--trainer.log_every_n_steps", 3)
    assert code == 0, text
    folder = tmp_path / "runs" / "version_0"
    files = {f"step={step}-{task}.jsonl" for step in (0, 2, 4, 5) for task in ("dapo_math", "ifeval")}
    assert {file.name for file in (folder / "eval").iterdir()} == files
    answers = [json.loads(line) for line in (folder / "eval" / "step=5-ifeval.jsonl").read_text().splitlines()]
    assert [row["index"] for row in answers] == [0, 1] and all(1 <= row["tokens"] <= 4 for row in answers)
    metrics = [
        row
        for row in csv.DictReader((folder / "metrics.csv").read_text().splitlines())
        if row["eval/dapo_math/accuracy"]
    ]
    assert [row["step"] for row in metrics] == ["0", "2", "4", "5"]
    assert all(0 <= float(row["eval/ifeval/inst_level_loose_acc"]) <= 1 for row in metrics)
    count = len((folder / "eval" / "step=5-dapo_math.jsonl").read_text().splitlines())
    bounds = [float(metrics[-1][f"eval/dapo_math/accuracy_{end}"]) for end in ("low", "high")]
    assert bounds == pytest.approx(wilson(0, count)) and "eval/dapo_math/answered_low" not in metrics[-1]
    assert list((folder / "checkpoints").glob("*.ckpt"))  # a monitor that never came would have been an error
    assert "eval/dapo_math/accuracy: 0.000 at the last step, 5; most: 0.000 at step 0" in caplog.text


@pytest.mark.filterwarnings("ignore:.*cut off at the token limit")  # random weights end no answer in a few
@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])  # a copy answers, the student itself answers
def test_training_is_bit_for_bit_the_same(opcd, words, tmp_path, precision):
    for callback in ({}, {"every_n_steps": 5, "at_start": True}):
        code, text = opcd(*words(20, **callback), "--trainer.precision", precision)
        assert code == 0, text
    without, with_evaluation = (tmp_path / "runs" / f"version_{number}" for number in (0, 1))
    assert not (without / "eval").exists()
    assert len(list((with_evaluation / "eval").iterdir())) == 2 * 5
    one, other = (load_file(folder / "student" / "model.safetensors") for folder in (without, with_evaluation))
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [torch.load(folder / "checkpoints" / "step=20.ckpt") for folder in (without, with_evaluation)]
    moments = [list(state["optimizer_states"][0]["state"].values()) for state in states]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*moments, strict=True))
    assert (without / "samples.jsonl").read_text() == (with_evaluation / "samples.jsonl").read_text()


def test_a_live_model_is_left_as_it_was(tiny, tmp_path):
    file = write_rows(tmp_path / "ifeval.jsonl", ifeval_rows())
    student = Student.load(ModelConfig(tiny), gradient_checkpointing=True)
    model, tokenizer = student.model, student.tokenizer
    model.config.use_cache = False
    model.model.layers[0].eval()  # a part that is frozen stays so
    tokenizer.padding_side = "right"
    evaluator = Evaluator(Evaluation("ifeval", {"ifeval": str(file)}, max_new_tokens=4), ModelConfig(tiny))

    def state() -> tuple:
        return (
            [module.training for module in model.modules()],
            [id(parameter) for parameter in model.parameters()],
            model.lm_head.weight is model.model.embed_tokens.weight,
            copy.deepcopy((model.config.to_dict(), model.generation_config.to_dict())),
            (tokenizer.padding_side, tokenizer.pad_token, tokenizer.chat_template),
            (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()),  # noqa: NPY002
            model.is_activation_checkpointing,
        )

    before = state()
    weights = copy.deepcopy(model.state_dict())
    evaluator(student)
    assert state() == before
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in weights.items())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_two_callbacks_and_a_run_that_goes_on(words, opcd, tmp_path, caplog):
    arguments = words(2, every_n_steps=1)
    overlay = yaml.safe_load((tmp_path / "overlay.yaml").read_text())
    second = copy.deepcopy(overlay["trainer"]["callbacks"][0])
    second["init_args"] |= {"name": "other", "at_start": True}
    overlay["trainer"]["callbacks"].append(second)
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(overlay))
    assert opcd(*arguments)[0] == 0
    assert len(list((tmp_path / "runs" / "version_0" / "other").iterdir())) == 2 * 3
    last = tmp_path / "runs" / "version_0" / "checkpoints" / "step=2.ckpt"
    code, text = opcd(*arguments, "--trainer.max_steps", 3, "--ckpt_path", last)
    assert code == 0, text
    assert "other/dapo_math/accuracy: 0.000 at the last step, 3; most: 0.000 at step 0" in caplog.text
    answers = [tmp_path / "runs" / f"version_{number}" / "other" for number in (0, 1)]
    assert {file.name[:6] for file in answers[1].iterdir()} == {f"step={step}" for step in range(4)}
    for file in answers[0].iterdir():  # taken over
        assert (answers[1] / file.name).read_text() == file.read_text()


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps >= 1"),
        ({"every_n_steps": 1, "evaluation": {"tasks": "ifevl"}}, "no task 'ifevl'; did you mean ifeval?"),
        ({"every_n_steps": 1, "evaluation": {"max_new_tokens": 511}}, "model.student.name: "),
    ],
)
def test_wrong_input_is_refused_before_a_model_is_loaded(opcd, words, callback, message, monkeypatch, tmp_path):
    monkeypatch.setattr("opcd.modules.student.load_model", lambda *_: pytest.fail("a model was loaded"))
    code, text = opcd(*words(2, **callback))
    assert code == 2 and message in text, text
    assert not list((tmp_path / "runs").glob("*"))


SUMS = """test_split: test
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
doc_to_target: reference
"""
GENERATES = """task: sums
output_type: generate_until
doc_to_text: query
generation_kwargs: {until: [], do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
TEXTS = """task: texts
output_type: loglikelihood
doc_to_text: ""
doc_to_target: query
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
"""
CHOOSES = """task: sums_choice
output_type: multiple_choice
doc_to_text: query
doc_to_choice: ["2", "4"]
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


def test_tasks_of_a_folder_and_rows_of_ones_own(opcd, words, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    folder = tmp_path / "mine"
    folder.mkdir()
    rows = [{"query": f"What is {n} + {n}?", "reference": str(2 * n)} for n in (1, 2)]
    file = write_rows(folder / "rows.jsonl", rows)
    for name, text in (("sums", GENERATES), ("sums_choice", CHOOSES), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(text + SUMS.replace("FILE", str(file)))
    evaluation = {"tasks": ["sums_choice", "sums", "texts", "contains"], "include_path": str(folder)}
    evaluation["data"] = {"contains": str(file)}
    code, text = opcd(*words(2, every_n_steps=1, at_start=True, evaluation=evaluation))
    assert code == 0, text
    run = tmp_path / "runs" / "version_0"
    names = {f"step={step}-{task}.jsonl" for step in range(3) for task in evaluation["tasks"]}
    assert {file.name for file in (run / "eval").iterdir()} == names
    with (run / "metrics.csv").open() as lines:
        metrics = [row for row in csv.DictReader(lines) if row["eval/sums_choice/acc"]]
    assert [row["step"] for row in metrics] == ["0", "1", "2"]
    chosen = [json.loads(line) for line in (run / "eval" / "step=2-sums_choice.jsonl").read_text().splitlines()]
    assert float(metrics[-1]["eval/sums_choice/acc"]) == sum(row["acc"] for row in chosen) / 2
    share = float(metrics[-1]["eval/sums_choice/acc"])
    assert float(metrics[-1]["eval/sums_choice/acc_low"]) == pytest.approx(wilson(2 * share, 2)[0])
    assert {"eval/sums/exact_match", "eval/contains/accuracy", "eval/sums/cut_off"} < metrics[-1].keys()
    assert "eval/sums_choice/cut_off" not in metrics[-1] and "eval/texts/perplexity_low" not in metrics[-1]
    values = [float(row["eval/texts/perplexity"]) for row in metrics]
    assert f"{min(values):.3f} at step {values.index(min(values))}" in caplog.text and "least: " in caplog.text
    first = [json.loads(line) for line in (run / "eval" / "step=0-sums_choice.jsonl").read_text().splitlines()]
    assert [row["log_likelihoods"] for row in first] != [row["log_likelihoods"] for row in chosen]  # it has learnt
    (measured,) = read_runs([run])
    shown = {(task, metric) for _, _, task, _, metric, *_ in evaluations([measured])[1]}
    assert {("sums_choice", "acc"), ("sums", "exact_match")} < shown
    assert not {metric for _, metric in shown} & {"log_likelihoods", "reference"}
    assert "eval/step=2-texts.jsonl: no scores of single answers: the values are in metrics.csv" in measured.problems


@pytest.mark.slow
def test_two_ranks_answer_each_their_share(words, tmp_path):
    """Greedy, in float64: the answers of one rank, each question once."""
    choices = [{"query": f"{n}?", "choices": ["one", "two", "three or more"], "reference": "two"} for n in range(4)]
    files = {"dapo_math": tmp_path / "math.jsonl", "ifeval": tmp_path / "ifeval.jsonl"}
    files["choice"] = write_rows(tmp_path / "choices.jsonl", choices)
    evaluation = {"limit": 3, "greedy": True, "tasks": list(files), "data": {k: str(v) for k, v in files.items()}}
    config = {"at_start": True, "evaluation": evaluation}
    for count in (1, 2):
        precision = ("--trainer.precision", "64-true", "--model.teacher", "SelfTeacher")
        run(*words(1, **copy.deepcopy(config)), *precision, *RANKS, count, "--data.batch_size", 2)
    one, two = ((tmp_path / "runs" / f"version_{number}" / "eval") for number in (0, 1))
    for task in files:
        first = [json.loads(line) for line in (one / f"step=0-{task}.jsonl").read_text().splitlines()]
        both = [json.loads(line) for line in (two / f"step=0-{task}.jsonl").read_text().splitlines()]
        assert [row["index"] for row in both] == [0, 1, 2]
        assert first == both
