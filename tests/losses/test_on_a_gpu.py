"""The losses on a GPU, which is simulated: no sync a chunk, few kernels, and the numbers of float64."""

import json
import os
import subprocess
import sys

import pytest
import torch

from opcd.losses.chunking import GPU_LIVE, rows_of
from tests.helpers.paths import ROOT

KERNELS = {
    "ReverseKL": 49,
    "ForwardKL": 49,
    "JSD": 59,
    "SkewReverseKL": 58,
    "TopK of the student": 126,
    "TopK of either": 132,
    "TopK of both": 132,
}


@pytest.fixture(scope="module")
def found():
    """The findings of each loss, made in a process of its own: the device stays registered."""
    words = [sys.executable, "-m", "tests.helpers.simulated.gpu_losses"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("loss", KERNELS)
def test_a_chunk_waits_for_nothing(found, loss) -> None:
    """One look at the values of all chunks, and one or two at the weights that the backward pass brings."""
    assert found[loss]["syncs"] == 0
    assert found[loss]["syncs of a call"] <= 4
    assert found[loss]["kernels"] <= KERNELS[loss]


@pytest.mark.parametrize("never", ["", "teacher", "both"])
@pytest.mark.parametrize("loss", KERNELS)
def test_values_statistics_and_gradients_are_those_of_float64(found, loss, never) -> None:
    """Also where tokens have probability zero, which is found after the chunks and repeated."""
    assert found[loss][f"error, {never}"] < 1e-5


def test_a_chunk_has_more_rows_on_a_gpu() -> None:
    gib, gpu, cpu = 2**30, torch.device("cuda"), torch.device("cpu")
    rows = {memory: rows_of(gpu, 151936, memory=memory * gib) for memory in (24, 80, 141)}
    assert rows == {24: 530, 80: 1766, 141: 3113}
    assert all(4 * GPU_LIVE * 151936 * count <= memory * gib / 10 for memory, count in rows.items())
    assert rows_of(gpu, 1000, memory=gib) == 3355 and rows_of(gpu, 1000, memory=80 * gib) == 4096
    assert rows_of(cpu, 1000) == 320 and rows_of(gpu, 1000, memory_bytes=1) == 1
