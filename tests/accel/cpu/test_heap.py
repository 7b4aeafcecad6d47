"""What is given back to the kernel, and what must stay."""

import ctypes
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from opcd.accel.cpu import accelerator as cpu
from opcd.accel.cpu import heap as memory
from opcd.accel.cpu.heap import drop_file_pages
from opcd.models import ModelConfig
from opcd.modules import Student, Trajectories

MIB = 2**20
linux = pytest.mark.skipif(not memory.SMAPS.exists(), reason="a file of Linux's")
glibc = pytest.mark.skipif(not memory.GLIBC, reason="glibc's allocator")


def resident_mib(kind: str) -> float:
    """RssFile or RssAnon of this process."""
    lines = memory.SMAPS.with_name("status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind)) / 2**10


@pytest.fixture
def mapped(tmp_path):
    """A tensor of 64 MiB out of a safetensors file, all of its pages in memory."""
    save_file({"weight": torch.arange(16 * MIB, dtype=torch.float32)}, tmp_path / "file.safetensors")
    weight = load_file(tmp_path / "file.safetensors")["weight"]
    weight.sum()
    return weight


@linux
def test_pages_of_a_file_leave_and_come_back(mapped):
    before, total = resident_mib("RssFile"), mapped.double().sum()
    drop_file_pages([mapped])
    assert before - resident_mib("RssFile") > 60
    assert mapped.double().sum() == total


@linux
def test_what_was_written_stays(mapped):
    mapped[5] = -1
    before = resident_mib("RssFile")
    drop_file_pages([mapped])
    assert before - resident_mib("RssFile") < 4
    assert mapped[5] == -1


@linux
def test_memory_of_no_file_stays():
    weight = torch.full((16 * MIB,), 3.0)
    drop_file_pages([weight, torch.empty(0)])
    assert weight.sum() == 3.0 * 16 * MIB


HEAP = """
import torch
from opcd.accel.cpu import heap as memory

def mapped_apart():
    # MiB of a block of 64 that have a mapping of their own, which goes back to the kernel with the block
    before = memory.heap().hblkhd
    block = torch.ones(2**24)
    print((memory.heap().hblkhd - before) // 2**20)

memory.keep_freed_blocks()
mapped_apart()
with memory.large_blocks_kept():
    mapped_apart()
memory.trim_heap()
mapped_apart()
"""


@glibc
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33")
def test_large_blocks_are_kept_within_alone():
    """In a process of its own: where glibc serves a thread from another arena, that cannot hold such a block."""
    done = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["64", "0", "64"], done.stderr


@linux
@pytest.mark.parametrize(
    ("large", "checkpointing", "leaves"), [(1, "false", 2), (2**30, "true", 2), (2**30, "false", 0)]
)
def test_a_frozen_teacher_leaves_while_the_student_learns(
    large, checkpointing, leaves, monkeypatch, tiny, rows, context, tmp_path, opcd
):
    """A large one, or where memory matters more than time: after its pass, and after the loss has read its head."""
    left = []
    monkeypatch.setattr(cpu, "LARGE", large)
    monkeypatch.setattr(cpu, "drop_file_pages", lambda weights: left.append(len(weights)))
    monkeypatch.setattr(cpu.CPUAccelerator, "forget_pages", lambda *arguments: None)  # of a model that was loaded
    code, output = opcd(
        *("fit", "--model.student.name", tiny, "--data.train", rows, "--data.context", context),
        *("--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path),
        *("--model.gradient_checkpointing", checkpointing),
    )
    assert code == 0, output
    assert len(left) == leaves and all(left)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_heap_goes_back_in_the_backward_pass(checkpointing, monkeypatch, tiny, batch):
    """Where memory matters more than time; tests/accel/cpu/test_backward_memory.py says when."""
    learner = Student.load(ModelConfig(tiny), gradient_checkpointing=checkpointing)
    trajectories = Trajectories.of(batch, [torch.tensor([5, 6, 7])] * len(batch), learner.eos_ids)
    hidden = learner.score(trajectories).hidden
    calls = []
    monkeypatch.setattr(cpu, "trim_heap", lambda: calls.append(None))
    hidden.sum().backward()
    assert bool(calls) == checkpointing
