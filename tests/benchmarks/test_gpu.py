"""benchmarks/gpu.py: every section runs on a CPU with tiny shapes, and says which cells failed."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The whole benchmark, and its lines."""
    file = tmp_path_factory.mktemp("gpu") / "found.jsonl"
    words = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--tiny", "--json", str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, [json.loads(line) for line in file.read_text().splitlines()]


def test_every_cell_runs(ran):
    _, cells = ran
    failed = [cell for cell in cells if "error" in cell]
    assert [cell for cell in failed if "Liger" not in cell["cell"]] == []
    assert list(dict.fromkeys(cell["section"] for cell in cells)) == [
        *("limits", "correct", "rollout", "teacher", "loss", "student", "step"),
    ]
    assert all(
        max(cell["differences"]) < 1e-5 for cell in cells if cell["section"] == "correct" and "16" not in cell["cell"]
    )


def test_the_table_has_every_cell_and_its_share_of_the_limit(ran):
    text, cells = ran
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(cells)
    counted = [row for row, cell in zip(rows, cells, strict=True) if "share" in cell]
    assert len(counted) >= 6 and all(row.endswith("% |") for row in counted)


@pytest.mark.parametrize(
    ("words", "message"), [(("losses",), "no section losses; there are limits, correct"), ((), "no GPU is here")]
)
def test_what_cannot_run_is_refused(words, message):
    command = [sys.executable, "benchmarks/gpu.py", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2 and message in done.stderr
