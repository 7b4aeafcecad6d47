"""Two processes on a CPU, as torchrun or Lightning start them: one run folder, one answer a row, the same weights."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.conftest import write_rows

RANKS = ("--trainer.accelerator", "cpu", "--trainer.strategy", "ddp", "--trainer.devices")


def run(*args: object, launcher: tuple[str, ...] = ()) -> str:
    """Run the command as a process of its own; returns what it printed."""
    words = [sys.executable, *launcher, "-m", "opcd", *args]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.fixture
def words(tiny, context, tmp_path):
    """Three steps of eight recorded responses, in float64: Adam makes whole steps out of a gradient's rounding."""
    rows = [{"query": f"What is {n} + {n}?", "response": "It is " + "so " * (n % 5) + str(2 * n)} for n in range(16)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return (
        *("--model.student.name", tiny, "--data.context", context, "--trainer.precision", "64-true"),
        *("--model.teacher", "SelfTeacher"),
        *("--model.answer.max_new_tokens", 3, "--trainer.default_root_dir", tmp_path / "runs"),
    ), ("--model.rollout", "RecordedRollout", "--data.train", file, "--trainer.max_steps", 3)


def test_two_ranks_train_the_weights_of_one(words, tmp_path):
    common, fit = words
    run("fit", *common, *fit, *RANKS, 1, "--data.batch_size", 8)
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 4)
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    run("fit", *common, *fit, *RANKS, 2, "--data.batch_size", 4, launcher=torchrun)
    folders = sorted((tmp_path / "runs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1", "version_2"]
    one, *others = (load_file(folder / "student" / "model.safetensors") for folder in folders)
    for other in others:
        for name, weight in one.items():
            assert_close(other[name], weight, rtol=0, atol=1e-8)
    for folder in folders:
        assert len((folder / "metrics.csv").read_text().splitlines()) == 4
        assert len((folder / "samples.jsonl").read_text().splitlines()) == 3 * 6


def test_two_ranks_answer_every_row_once(words, tmp_path):
    common, _ = words
    rows = write_rows(tmp_path / "ask.jsonl", [{"query": f"What is {n} + {n}?"} for n in range(5)])
    run("predict", *common, "--data.predict", rows, "--data.batch_size", 2, *RANKS, 2)
    (folder,) = (tmp_path / "runs").iterdir()
    files = sorted(Path(folder).glob("predictions*.jsonl"))
    assert [file.name for file in files] == ["predictions-1.jsonl", "predictions.jsonl"]
    answers = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert sorted((a["query"], a["context"]) for a in answers) == [
        (f"What is {n} + {n}?", context) for n in range(5) for context in (False, True)
    ]
