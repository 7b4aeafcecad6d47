"""`opcd sweep` as users call it, with real fits of a tiny model."""

import csv
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import QUICKSTART

ROOT = QUICKSTART.parent.parent


@pytest.fixture
def sweep_file(tmp_path, tiny, rows, context):
    def write(name: str = "sweep.yaml", **parts: object) -> Path:
        shared = {
            "model.student.name": tiny,
            "data.train": str(rows),
            "data.val": str(rows),
            "data.context": str(context),
            "trainer.max_steps": 2,
            "trainer.limit_val_batches": 1,
            "trainer.enable_checkpointing": False,
            "model.eval_sampling.max_new_tokens": 4,
            "model.rollout": {"class_path": "StudentRollout", "init_args": {"sampling": {"max_new_tokens": 4}}},
        }
        file = tmp_path / name
        file.write_text(
            yaml.safe_dump({"base": {"config": [str(QUICKSTART)], "set": shared}, **parts}, sort_keys=False)
        )
        return file

    return write


def test_a_dry_run_checks_and_leaves_nothing(opcd, sweep_file, tmp_path):
    file = sweep_file(axes={"model.loss": ["JSD", "ForwardKL"], "seed_everything": [0, 1]})
    code, text = opcd("sweep", file, "--out", tmp_path / "out", "--dry_run")
    assert code == 0 and "loss=JSD,seed_everything=1" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"axes": {"model.los": ["JSD"]}}, "axes: 'model.los' is no config key; did you mean model.loss?"),
        ({"axes": {"model.loss": ["JSD", "JSD"]}}, "two arms are called loss=JSD"),
        ({"axes": {"model.loss": ["JSD", "KSD"]}}, "arm loss=KSD: "),
        ({"arms": {"a": {"model.los": "JSD"}}}, "arms.a: 'model.los' is no config key"),
        ({"axes": {"model.optimizer.init_args.lrr": [1.0]}}, "AdamW has no option lrr; did you mean lr?"),
        ({"axes": {"model.temperature": [1.0]}, "search": {"metric": "x"}}, "search: opcd no longer searches"),
    ],
)
def test_user_mistakes_end_with_2_before_anything_is_written(opcd, sweep_file, tmp_path, parts, message):
    code, text = opcd("sweep", sweep_file(**parts), "--out", tmp_path / "out")
    assert code == 2 and message in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_dotted_options_go_over_the_base(opcd, sweep_file, tmp_path):
    file, out = sweep_file(axes={"model.loss": ["JSD"]}), ("--out", tmp_path / "out", "--dry_run")
    assert opcd("sweep", file, "--trainer.max_steps", 3, *out)[0] == 0
    code, text = opcd("sweep", file, "--trainer.max_stepz", 3, *out)
    assert code == 2 and "'trainer.max_stepz' is no config key; did you mean trainer.max_steps?" in text
    code, text = opcd("sweep", file, "--trainer.max_steps", "three", *out)
    assert code == 2 and "trainer.max_steps" in text
    code, text = opcd("sweep", file, "--trainer.max_steps", *out[:1])
    assert code == 2 and "Traceback" not in text


def test_wrong_numbers_of_jobs(opcd, sweep_file):
    for jobs in ("0", "-1", "two"):
        code, text = opcd("sweep", sweep_file(axes={"model.loss": ["JSD"]}), "--jobs", jobs)
        assert code == 2 and "--jobs" in text


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on(sweep_file, tmp_path, tiny):
    """One arm fails while it loads its weights; the sweep is killed after the first arm, and started twice again."""
    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    (broken / "model.safetensors").write_bytes(b"no weights")
    losses = {"jsd": {"model.loss": "JSD"}, "broken": {"model.student.name": str(broken)}, "kl": {}}
    file, out = sweep_file(arms=losses, axes={"seed_everything": [0, 1]}), tmp_path / "out"
    command = [sys.executable, "-m", "opcd", "sweep", str(file), "--out", str(out), "--jobs", "2"]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not list(out.glob("arms/*/finished.json")) and time.monotonic() < end:
        time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    assert first.wait(60) == 130
    marks = {mark: mark.stat().st_mtime_ns for mark in out.glob("arms/*/finished.json")}
    assert 1 <= len(marks) < 4
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "2 of 6 arms failed" in done.stdout and "broken,seed_everything=0: exit code" in done.stdout
    assert {mark: mark.stat().st_mtime_ns for mark in marks} == marks  # not run again
    rows = list(csv.DictReader((out / "summary.csv").read_text().splitlines()))
    assert [row["status"] for row in rows] == ["finished"] * 2 + ["failed"] * 2 + ["finished"] * 2
    assert float(rows[0]["train/divergence"]) != float(rows[1]["train/divergence"])  # two seeds
    assert "± " in (out / "summary.md").read_text()
    assert (out / "plots" / "train_divergence_steps.svg").read_text().startswith("<svg")
    assert (out / "arms" / "jsd,seed_everything=0" / "log.txt").exists()


def test_the_packaged_sweep_is_right_for_any_two_models(opcd, tiny, tiny_teacher, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = ("--model.student.name", tiny, "--model.teacher.init_args.model.name", tiny_teacher)
    code, text = opcd("sweep", "benchmarks/sweeps/less_memory.yaml", *names, "--dry_run")
    teachers = ("", "__8-bit_teacher", "__4-bit_teacher", "__its_base_teaches")
    pairs = {trained + teacher for trained in ("full", "LoRA", "QLoRA") for teacher in teachers}
    assert code == 0 and pairs - {"full__its_base_teaches"} <= set(text.splitlines())
    code, text = opcd("sweep", "benchmarks/sweeps/detachable_state.yaml", "--model.student.name", tiny, "--dry_run")
    assert code == 0 and {"full_weights", "LoRA", "Cartridge"} <= set(text.splitlines()), text
