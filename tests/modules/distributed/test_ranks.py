"""Two processes on a CPU, as torchrun or Lightning start them: one run folder, one answer a row, the same weights."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.helpers.ranks import RANKS, run
from tests.helpers.rows import write_rows


@pytest.fixture
def words(tiny, context, tmp_path):
    """Three steps of eight recorded responses, in float64: Adam makes whole steps out of a gradient's rounding."""
    rows = [{"query": f"What is {n} + {n}?", "response": "It is " + "so " * (n % 5) + str(2 * n)} for n in range(16)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return (
        *("--model.student.name", tiny, "--data.context", context, "--trainer.precision", "64-true"),
        *("--model.teacher", "SelfTeacher"),
        *("--model.eval_sampling.max_new_tokens", 3, "--trainer.default_root_dir", tmp_path / "runs"),
    ), ("--model.rollout", "RecordedRollout", "--data.train", file, "--trainer.max_steps", 3)


@pytest.mark.slow
def test_two_ranks_train_the_weights_of_one(words, tmp_path):
    common, fit = words
    run("fit", *common, *fit, *RANKS, 1, "--data.batch_size", 8)
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 8)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 8, launcher=torchrun)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    one, *others = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    for other in others:
        for name, weight in one.items():
            # What rows begin with gets a rank's sum of gradients, which the norms take on in float32.
            assert_close(other[name], weight, rtol=0, atol=1e-7)
    for folder in folders:
        assert len((folder / "metrics.csv").read_text().splitlines()) == 6  # two of recovery and drift
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 3 * 6


@pytest.mark.slow
def test_two_ranks_of_one_teacher_each(words, tmp_path):
    """In every step each rank has rows of one teacher alone; weights and means are those of one rank."""
    common, _ = words
    rows = [
        {"query": f"What is {n} + {n}?", "response": "It is " + "so " * n, "teacher": name}
        for n, name in enumerate(["a", "b"] * 4)
    ]
    teachers = {"a": {"class_path": "SelfTeacher"}, "b": {"class_path": "MovingAverageTeacher"}}
    routed = {"class_path": "RoutedTeachers", "init_args": {"teachers": teachers}}
    file = write_rows(tmp_path / "routed.jsonl", rows)
    fit = ("--model.rollout", "RecordedRollout", "--data.train", file, "--data.val", file, "--data.shuffle", "false")
    fit += ("--model.teacher", json.dumps(routed), "--trainer.max_steps", 4)
    run("fit", *common, *fit, *RANKS, 1, "--data.batch_size", 2)
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 2)
    folders = sorted((tmp_path / "runs").iterdir())
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=0, atol=1e-7)  # products of other shapes round otherwise
    logged = [list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())) for folder in folders]
    names = [f"{split}/divergence{teacher}" for split in ("train", "val") for teacher in ("", "/a", "/b")]
    assert all(any(step[name] for step in logged[0]) for name in names)
    for alone, together in zip(*logged, strict=True):
        assert [float(together[name] or 0) for name in names] == pytest.approx(
            [float(alone[name] or 0) for name in names], rel=1e-6
        )


@pytest.mark.slow
def test_two_ranks_answer_every_row_once(words, tmp_path):
    common, _ = words
    rows = write_rows(tmp_path / "ask.jsonl", [{"query": f"What is {n} + {n}?"} for n in range(5)])
    run("predict", *common, "--data.predict", rows, "--data.batch_size", 2, *RANKS, 2)
    (folder,) = (tmp_path / "runs").iterdir()
    files = sorted(Path(folder).glob("predictions*.jsonl"))
    assert [file.name for file in files] == ["predictions-1.jsonl", "predictions.jsonl"]
    answers = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted(a["query"] for a in answers) == [f"What is {n} + {n}?" for n in range(5)]
    assert all(a["answer_with_context"] is not None for a in answers)


@pytest.mark.slow
def test_two_ranks_leave_together_and_go_on_exactly(words, tmp_path):
    """Each rank draws its own responses; SIGTERM reaches the first process only."""
    common, fit = words
    sampled = ("--model.rollout", "StudentRollout", "--model.rollout.init_args.sampling.max_new_tokens", 6)
    fit = ("fit", *common, *fit, *sampled, "--data.batch_size", 4, "--trainer.max_steps", 12, *RANKS, 2)
    run(*fit, "--trainer.default_root_dir", tmp_path / "whole")
    broken = (*fit, "--trainer.default_root_dir", tmp_path / "broken", "--ckpt_path", "last")
    process = subprocess.Popen([sys.executable, "-m", "opcd", *map(str, broken)], stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "broken" / "version_0" / "metrics.csv"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said[-3000:]
    (saved,) = (tmp_path / "broken" / "version_0" / "checkpoints").glob("*.ckpt")
    assert saved.name != "step=12.ckpt"
    run(*broken)
    one, other = (
        load_file(tmp_path / name / "student" / "model.safetensors") for name in ("whole/version_0", "broken/version_1")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_two_ranks_share_the_anchors(words, tmp_path):
    """Every step has the rows and the anchors that one rank would have, and so its weights and means."""
    common, fit = words
    anchors = [{"query": f"Who wrote book {n}?", "response": "Somebody " + "else " * (n % 4)} for n in range(5)]
    source = write_rows(tmp_path / "anchors.jsonl", anchors)
    fit += ("--data.anchors", json.dumps({"share": 0.5, "source": str(source)}), "--trainer.max_steps", 6)
    run("fit", *common, *fit, *RANKS, 1, "--data.batch_size", 8)
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 8)
    folders = sorted((tmp_path / "runs").iterdir())
    one, two = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    for name, weight in one.items():
        assert_close(two[name], weight, rtol=0, atol=1e-7)
    logged = [list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())) for folder in folders]
    names = ["train/divergence", "train/divergence/anchors", "train/response_tokens"]
    steps = [[[float(step[name]) for name in names] for step in run if step[names[0]]] for run in logged]
    assert len(steps[0]) == 6 and steps[0][-1][1] > 0
    for alone, together in zip(*steps, strict=True):
        assert together == pytest.approx(alone, rel=1e-4)
