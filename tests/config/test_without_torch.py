"""What needs no torch does not wait for it: each command in a process of its own. `make test-fast` leaves these out."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import QUICKSTART, ROOT

RECIPE = str(QUICKSTART)
UNSEEN = """import sys
from opcd.cli.main import main
code = main(sys.argv[1:])
sys.exit(99 if 'torch' in sys.modules else code)"""


def without_torch(*words: object, cwd: Path | None = None) -> tuple[int, str]:
    """The command in a process of its own, whose exit code is 99 where it imported torch."""
    command = [sys.executable, "-c", UNSEEN, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.case("C15")
@pytest.mark.parametrize(
    "words",
    [
        ["fit"],
        ["fit", "--config", RECIPE, "--data.batchsize", "4"],
        ["fit", "--config", "nope.yaml"],
        ["fit", "--config", RECIPE, "--data.train", "nope.jsonl"],
        ["fit", "--config", RECIPE, "--data.train", "bad.jsonl"],
        ["fit", "--config", "bad.yaml"],
        ["report", "nope"],
        ["show", "nope"],
        ["completion", "bsh"],
        ["doctor", "--pln"],
        ["init", "bad.jsonl"],
    ],
    ids=" ".join,
)
def test_a_mistake_that_needs_no_torch_does_not_wait_for_it(tmp_path, words):
    (tmp_path / "bad.yaml").write_text("model: {optimizer: {class_path: torch.optim.AdamW}, los: JSD}\n")
    (tmp_path / "bad.jsonl").write_text('{"query": "What?"}\n{not json\n')
    code, text = without_torch(*words, cwd=tmp_path)
    assert code == 2 and "Traceback" not in text, text


@pytest.mark.case("C15")
def test_commands_that_read_and_write_files_alone_do_not_wait_for_torch(tmp_path):
    run = tmp_path / "version_0"
    run.mkdir()
    (run / "config.yaml").write_text("trainer: {max_steps: 1}\n")
    (run / "metrics.csv").write_text("step,train/divergence\n0,0.5\n1,0.25\n")
    shipped = ROOT / "benchmarks" / "results" / "experience"
    for words in (
        ("init", tmp_path / "new"),
        ("report", run, "--out", tmp_path / "run.html"),
        ("show", shipped, "--page", tmp_path / "experience.html"),
        ("completion", "--help"),
        ("doctor", "--help"),
    ):
        try:
            code, text = without_torch(*words)
        except subprocess.TimeoutExpired:
            pytest.fail(f"{words[0]} takes minutes")
        assert code == 0, (words, text)
