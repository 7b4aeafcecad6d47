"""The type is chosen from the hardware where the user chooses none; one that is emulated is warned of."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch

from opcd.accel import precision
from opcd.models import ModelConfig, load_model
from opcd.modules import FrozenTeacher, Lora, Sampling, Student, StudentRollout
from opcd.planning import reading


@pytest.fixture(params=[True, False], ids=["with bfloat16", "without"])
def bfloat16(request, monkeypatch):
    """Whether this CPU has the instructions; both are tried on every machine."""
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: ("avx2", "avx512_bf16") if request.param else ("avx2",))
    precision._warn.cache_clear()
    return request.param


@pytest.mark.case("C1")
def test_every_part_follows_the_hardware(tiny, batch, bfloat16):
    fast = torch.bfloat16 if bfloat16 else torch.float32
    config = ModelConfig(tiny)
    assert precision.fast_dtype() == fast
    assert precision.trainer_precision("cpu") == ("bf16-mixed" if bfloat16 else "32-true")
    student, teacher, rollout = Student.load(config), FrozenTeacher(), StudentRollout(Sampling(2))
    assert student.model.dtype == torch.float32  # it is trained
    teacher.setup(student, config, torch.device("cpu"))
    assert teacher.model.dtype == fast
    with rollout.active(student):
        wrote = rollout._copy.dtype if rollout._copy is not None else student.model.dtype
        assert wrote == fast
        assert len(rollout.generate(student, teacher, batch)) == len(batch)
    adapted = Student.load(config, adapter=Lora(rank=2)).model
    assert {p.dtype for p in adapted.parameters() if not p.requires_grad} == {fast}
    assert {p.dtype for p in adapted.parameters() if p.requires_grad} == {torch.float32}
    assert load_model(config).dtype == fast  # answers: chat, evaluate, experience


@pytest.mark.case("C1")
def test_a_run_says_and_saves_what_it_computes_in(opcd, tmp_path, rows, context, tiny, bfloat16, capsys):
    words = ["--model.student.name", tiny, "--data.train", rows, "--data.context", context, "--trainer.max_steps", 1]
    words += ["--model.rollout.init_args.sampling.max_new_tokens", 2, "--trainer.accelerator", "cpu"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of emulation: nothing was asked for
        warnings.filterwarnings("ignore", "with the context, the teacher is right on")
        code, text = opcd("fit", *words, "--trainer.default_root_dir", tmp_path / "runs")
    assert code == 0, text
    config = (tmp_path / "runs/version_0/config.yaml").read_text()
    assert f"precision: {'bf16-mixed' if bfloat16 else '32-true'}" in config


def test_a_choice_that_is_emulated_is_warned_of_once(tiny, bfloat16):
    config = ModelConfig(tiny, dtype="bfloat16")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            student = Student.load(config)
            with StudentRollout(Sampling(2), dtype="float16").active(student):
                pass
            precision.warn_if_emulated("trainer.precision", torch.bfloat16, "cpu")
    found = [str(warning.message) for warning in told if "is emulated on this CPU" in str(warning.message)]
    keys = ["model.rollout's dtype: float16"]  # an AVX512-BF16 CPU has no float16 instructions either
    keys += [] if bfloat16 else ["model.student.dtype: bfloat16", "trainer.precision: bfloat16"]
    assert sorted(message.partition(" is ")[0] for message in found) == sorted(keys)
    assert all("ten times" in message and "remove the key" in message for message in found)


@pytest.mark.case("C1")
def test_a_precision_that_is_emulated_is_warned_of(opcd, tmp_path, rows, context, tiny, monkeypatch):
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: ("avx2",))
    precision._warn.cache_clear()
    words = ["--model.student.name", tiny, "--data.train", rows, "--data.context", context, "--trainer.max_steps", 1]
    words += ["--model.rollout.init_args.sampling.max_new_tokens", 2, "--trainer.accelerator", "cpu"]
    words += ["--trainer.precision", "bf16-mixed", "--trainer.default_root_dir", tmp_path / "runs"]
    with pytest.warns(UserWarning, match="trainer.precision: bfloat16 is emulated"):
        code, _ = opcd("fit", *words)
    assert code == 0


@pytest.mark.parametrize(("value", "hidden"), [("AVX2", True), ("avx512_core", True), ("AVX512_CORE_AMX", False)])
def test_the_environment_hides_the_instructions_as_from_onednn(monkeypatch, value, hidden):
    monkeypatch.setattr(precision, "_cpu_capabilities", lambda: ("amx_bf16",))
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", value)
    assert precision.has_bfloat16("cpu") is not hidden


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), torch.float32), ((8, 0), torch.bfloat16)])
def test_a_gpu_needs_compute_capability_8(monkeypatch, capability, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: type("Properties", (), {"major": capability[0]})()
    )
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert precision.fast_dtype("cuda") == fast
    assert precision.reason("cuda") == f"a GPU has {'' if fast == torch.bfloat16 else 'no '}bfloat16 instructions"


def test_a_plan_takes_the_same_types(bfloat16):
    assert reading._precision(None, precision.fast_dtype()) == (torch.bfloat16 if bfloat16 else None, None)


@pytest.mark.parametrize("given", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_that_wait_leave_the_cores_to_others_unless_the_user_says(given):
    named = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
    environment = {name: value for name, value in os.environ.items() if name not in named} | given
    code = "import opcd, json, os, sys; print(json.dumps([dict(os.environ), 'torch' in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    found, torch_is_there = json.loads(done.stdout)
    assert {name: found[name] for name in named if name in found} == (given or {"GOMP_SPINCOUNT": "1000"})
    assert not torch_is_there
