"""FSDP2 with two processes on a CPU: the weights of one process, and checkpoints that any number of ranks reads."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from opcd.models import ModelConfig
from opcd.modules import Distiller, FrozenTeacher, RoutedTeachers, SelfTeacher, Student, StudentRollout, TeacherRollout
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError
from tests.helpers.ranks import SHARDED, run
from tests.helpers.rows import write_rows
from tests.helpers.task_rows import math_rows

ONE = (
    *("--trainer.accelerator", "cpu", "--trainer.devices", 1),
    *("--trainer.precision", "32-true", "--trainer.max_steps", 1),
)


@pytest.fixture(autouse=True)
def own_environment():
    """Lightning tells a rank in the environment who it is, and at which port the others are."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture
def fit(tiny, context, tmp_path):
    """Eight recorded responses a step, however many ranks there are, in float64. Every other one is long: with two
    ranks, one has a single pass to make and the other four."""
    rows = [{"query": f"What is {n}?", "response": "so " * (60 if n % 2 else 1) + str(n)} for n in range(8)]
    return (
        *("fit", "--model.student.name", tiny, "--data.context", context, "--trainer.precision", "64-true"),
        *("--data.train", write_rows(tmp_path / "rows.jsonl", rows), "--data.batch_size", 8, "--data.shuffle", "false"),
        *("--model.rollout", "RecordedRollout", "--model.teacher", "SelfTeacher"),
        *("--model.eval_sampling.max_new_tokens", 3),
        *("--model.micro_batch_tokens", 110, "--trainer.accelerator", "cpu", "--model.shared_prefix", "never"),
    )


def saved(root: Path, version: int, step: int) -> dict:
    """A checkpoint."""
    return torch.load(root / f"version_{version}" / "checkpoints" / f"step={step}.ckpt")


def exported(folder: Path) -> dict[str, torch.Tensor]:
    """A student's weights."""
    return load_file(folder / "model.safetensors")


def assert_same(one: dict, other: dict, atol: float) -> None:
    """Weights and moments of two checkpoints are the same, and their forms are."""
    assert one.keys() == other.keys()
    (one_optimizer,), (other_optimizer,) = one["optimizer_states"], other["optimizer_states"]
    assert one_optimizer["param_groups"] == other_optimizer["param_groups"]
    assert_close(other["state_dict"], one["state_dict"], rtol=0, atol=atol)
    assert_close(other_optimizer["state"], one_optimizer["state"], rtol=0, atol=atol)


@pytest.mark.slow
def test_a_run_on_two_ranks_one_and_two_takes_the_steps_of_one(fit, opcd, tmp_path):
    whole, parts = (tmp_path / name for name in ("whole", "parts"))
    assert opcd(*fit, "--trainer.default_root_dir", whole, "--trainer.max_steps", 5)[0] == 0
    on = (*fit, "--trainer.default_root_dir", parts, "--ckpt_path", "last", "--trainer.max_steps")
    run(*on, 2, *SHARDED, "--model.gradient_checkpointing", "true")
    with pytest.warns(UserWarning, match="random-number states of 2 ranks"):
        assert opcd(*on, 3)[0] == 0
    run(*on, 5, *SHARDED)
    assert_same(saved(whole, 0, 5), saved(parts, 2, 5), atol=1e-8)
    one, other = (exported(root / "student") for root in (whole / "version_0", parts / "version_2"))
    assert_close(other, one, rtol=0, atol=1e-7)  # in float32
    start = exported(Path(fit[2]))
    assert all((one[name] - start[name]).abs().max() > 1e-6 for name in one)
    lines = (parts / "version_2" / "metrics.csv").read_text().splitlines()
    assert [int(line["step"]) for line in csv.DictReader(lines) if line["train/divergence"]] == [3, 4]


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        ("fsdp", "fsdp is not supported; use ddp, or fsdp2"),
        ("deepspeed_stage_2", "deepspeed_stage_2 is not supported; use ddp, or fsdp2"),
        ("lightning.pytorch.strategies.FSDPStrategy", "FSDPStrategy is not supported"),
        ("ModelParallelStrategy", "ModelParallelStrategy is not supported; use ddp, or fsdp2"),
        (("FSDP2Strategy", "tensor_parallel_size", 2), "tensor_parallel_size is 2, but tensor parallelism"),
        (("FSDP2Strategy", "data_parallel_size", 3), "data_parallel_size is 3, but there are 1 ranks"),
    ],
)
def test_what_cannot_work_is_refused(fit, opcd, tmp_path, strategy, said):
    if not isinstance(strategy, str):
        name, argument, value = strategy
        strategy = tmp_path / "overlay.yaml"
        init = {"class_path": f"opcd.modules.{name}", "init_args": {"tensor_parallel_size": 1}}
        init["init_args"][argument] = value
        strategy.write_text(yaml.safe_dump({"trainer": {"strategy": init}}))
        words = ("--config", strategy)
    else:
        words = ("--trainer.strategy", strategy)
    code, text = opcd(*fit, "--trainer.default_root_dir", tmp_path / "runs", *words, *ONE)
    assert code == 2 and said in text, text
    assert not list((tmp_path / "runs").glob("version_*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--model.adapter.rank", 4, "--model.teacher", "BaseTeacher"), "use ddp with model.adapter"),
        (("--model.shrink_on_oom", "true"), "model.shrink_on_oom does not work under fsdp2"),
        (("--model.optimizer", "bitsandbytes.optim.AdamW8bit"), "AdamW8bit of bitsandbytes takes no sharded weights"),
    ],
)
def test_a_student_that_cannot_be_sharded_is_refused(fit, opcd, tmp_path, monkeypatch, words, said):
    monkeypatch.setattr(Student, "load", None)  # it comes before
    root = ("--trainer.default_root_dir", tmp_path / "runs")
    code, text = opcd(*fit, *root, *words, *ONE, "--trainer.strategy", "fsdp2")
    assert code == 2 and said in text, text


@pytest.mark.slow
def test_all_that_a_run_does_beside_training(tiny, rows, context, tmp_path):
    """Sampled responses, an average, validation, answers, evaluation and export, in bfloat16."""
    evaluation = {"tasks": "dapo_math", "data": {"dapo_math": str(write_rows(tmp_path / "math.jsonl", math_rows()))}}
    callbacks = [
        {"class_path": "opcd.callbacks.LMEval", "init_args": {"evaluation": evaluation | {"max_new_tokens": 4}}},
        {"class_path": "opcd.callbacks.ExportStudent", "init_args": {"every_n_steps": 1}},
    ]
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    run(
        *("fit", "--config", tmp_path / "overlay.yaml", *SHARDED, "--trainer.default_root_dir", tmp_path / "runs"),
        *("--model.student.name", tiny, "--data.context", context, "--data.train", rows, "--data.val", rows),
        *("--data.batch_size", 4, "--data.eval_batch_size", 2, "--trainer.num_sanity_val_steps", 1),
        *("--model.rollout.sampling.max_new_tokens", 6, "--model.eval_sampling.max_new_tokens", 3),
        *("--trainer.max_steps", 2),
        *("--model.teacher", "MovingAverageTeacher", "--model.teacher.decay", 0.5, "--trainer.precision", "bf16-mixed"),
        *("--model.optimizer", "SGD", "--model.optimizer.lr", 0.01, "--model.gradient_checkpointing", "true"),
    )
    folder = tmp_path / "runs" / "version_0"
    checkpoint = saved(tmp_path / "runs", 0, 2)
    before, between, after = exported(Path(tiny)), exported(folder / "student-step=1"), exported(folder / "student")
    for name, weight in after.items():
        assert torch.equal(weight, checkpoint["state_dict"][f"student.model.{name}"])
        assert (between[name] - before[name]).abs().max() > 0 and (weight - between[name]).abs().max() > 0
        average = 0.5 * (0.5 * before[name] + 0.5 * between[name]) + 0.5 * weight
        assert_close(checkpoint["teacher"]["model"][name], average, rtol=1e-6, atol=1e-7)
    lines = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
    for key in ("train/divergence", "val/divergence", "eval/dapo_math/accuracy"):
        assert any(line[key] for line in lines), key
    assert len((folder / "samples.jsonl").read_text().splitlines()) == 3 * 6
    assert len((folder / "eval" / "step=2-dapo_math.jsonl").read_text().splitlines()) == 4


@pytest.mark.slow
def test_a_killed_run_goes_on_exactly(fit, tmp_path):
    """Each rank draws its own responses; SIGKILL reaches both."""
    sampled = ("--model.rollout", "StudentRollout", "--model.rollout.init_args.sampling.max_new_tokens", 6)
    save = ("--trainer.callbacks+", "SaveCheckpoints", "--trainer.callbacks.every_n_steps", 2)
    words = (*fit, *SHARDED, *sampled, *save, "--trainer.max_steps", 12)
    run(*words, "--trainer.default_root_dir", tmp_path / "whole")
    broken = (*words, "--trainer.default_root_dir", tmp_path / "broken", "--ckpt_path", "last")
    process = subprocess.Popen([sys.executable, "-m", "opcd", *map(str, broken)], start_new_session=True)
    checkpoints = tmp_path / "broken" / "version_0" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("*.ckpt")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (checkpoints / "step=12.ckpt").exists()
    run(*broken)
    assert_same(saved(tmp_path / "whole", 0, 12), saved(tmp_path / "broken", 1, 12), atol=0)


@pytest.fixture
def taught(tiny, tiny_teacher, context, tmp_path):
    """Eight recorded responses a step, every other one long: of two ranks one has fewer passes to make."""
    rows = [{"query": f"What is {n}?", "response": "so " * (60 if n % 2 else 1) + str(n)} for n in range(8)]
    return (
        *("fit", "--model.student.name", tiny, "--data.context", context, "--trainer.precision", "64-true"),
        *("--data.train", write_rows(tmp_path / "rows.jsonl", rows), "--data.shuffle", "false"),
        *("--model.rollout", "RecordedRollout", "--model.teacher", "FrozenTeacher", "--model.micro_batch_tokens", 110),
        *("--model.teacher.model.name", tiny_teacher, "--model.teacher.model.dtype", "float32"),
        *("--model.eval_sampling.max_new_tokens", 3, "--trainer.max_steps", 2, "--trainer.accelerator", "cpu"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_teacher_in_parts_teaches_what_it_teaches_whole(strategy, taught, opcd, tmp_path):
    whole, parts = (("--trainer.default_root_dir", tmp_path / name) for name in ("whole", "parts"))
    assert opcd(*taught, *whole, "--data.batch_size", 8, "--model.shared_prefix", "always")[0] == 0
    two = ("--trainer.accelerator", "cpu", "--trainer.devices", 2, "--trainer.strategy", strategy)
    run(
        *taught,
        *parts,
        *two,
        "--data.batch_size",
        8,
        "--model.teacher.shard",
        "true",
        "--model.shared_prefix",
        "always",
    )
    assert_same(saved(tmp_path / "whole", 0, 2), saved(tmp_path / "parts", 0, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("teacher", "rollout", "ranks", "prefix", "said"),
    [
        (FrozenTeacher(shard=True), StudentRollout(), 1, "always", "has no effect on one rank"),
        (FrozenTeacher(shard=True), StudentRollout(), 2, "auto", "set it to always"),
        (FrozenTeacher(shard=True), TeacherRollout(), 2, "never", "cannot write responses"),
        (FrozenTeacher(ModelConfig("a", quantization="4bit"), True), StudentRollout(), 2, "never", "quantized weights"),
    ],
)
def test_what_a_teacher_in_parts_cannot_do_is_refused(teacher, rollout, ranks, prefix, said):
    distiller = Distiller(teacher=teacher, rollout=rollout, shared_prefix=prefix)
    with pytest.raises(UserError, match=said):
        validate(Run(distiller, ranks=ranks))


def test_predictions_need_no_teacher_and_so_none_in_parts(tiny, rows, context, opcd, tmp_path):
    words = ("--model.student.name", tiny, "--data.predict", rows, "--trainer.default_root_dir", tmp_path / "runs")
    quick = ("--trainer.accelerator", "cpu", "--model.eval_sampling.max_new_tokens", 2)
    assert opcd("predict", *words, *quick, "--model.teacher.init_args.shard", "true")[0] == 0
    fit = ("fit", "--data.train", rows, "--data.context", context, *words[:2], *words[4:], "--trainer.max_steps", 1)
    code, text = opcd(*fit, "--model.teacher.init_args.shard", "true")
    assert code == 2 and "shard has no effect on one rank" in text


def test_several_teachers_cannot_lie_in_parts():
    with pytest.raises(UserError, match="ranks without rows of this teacher"):
        validate(Run(Distiller(teacher=RoutedTeachers({"a": FrozenTeacher(shard=True), "b": SelfTeacher()})), ranks=2))
