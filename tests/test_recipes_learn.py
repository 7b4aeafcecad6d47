"""The quickstart's recipe learns, on its own facts and on two sets that it was not tuned to: minutes each."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from opcd.tasks.matching import right
from tests.helpers.paths import ROOT

CONTEXTS = ROOT / "tests" / "contexts"


def answers(tmp_path: Path, *changes: str) -> tuple[int, int]:
    """How many of six held-out questions are right without the context, before and after training."""
    words = ("fit", "--config", "configs/quickstart.yaml", "--trainer.default_root_dir", str(tmp_path), *changes)
    subprocess.run([sys.executable, "-m", "opcd", *words], check=True, cwd=ROOT)
    rows = [json.loads(line) for line in (tmp_path / "version_0" / "samples.jsonl").read_text().splitlines()]
    alone = [row for row in rows if not row["context"]]
    last = max(row["step"] for row in alone)
    assert last > 0
    before, after = (sum(right(row) for row in alone if row["step"] == step) for step in (0, last))
    return before, after


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [None, "bakery", "ferry"])
def test_the_quickstart_learns_six_facts(tmp_path: Path, name: str | None) -> None:
    changes = [
        *("--data.train", str(CONTEXTS / f"{name}_train.jsonl"), "--data.val", str(CONTEXTS / f"{name}_val.jsonl")),
        *("--data.context", str(CONTEXTS / f"{name}.txt")),
    ]
    before, after = answers(tmp_path, *(changes if name else ()))
    assert before <= 1
    assert after >= 5
