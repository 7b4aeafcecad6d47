"""Every recipe takes a step on a GPU, which is simulated: a CPU tensor among the GPU's is an error there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
NOT_HERE = {
    "fsdp2": "shards over ranks, whose collectives the simulated device lacks",
    "qlora": "bitsandbytes has kernels for a CPU and for CUDA alone",
    "teacher_4bit": "bitsandbytes has kernels for a CPU and for CUDA alone",
}
DATA = ("--data.train", "configs/data/quickstart_train.jsonl", "--data.context", "configs/data/quickstart_context.txt")
TEACHER = ("--model.teacher.init_args.model.name", "TINY")
PLAIN = ("--model.student.chat_template_kwargs", "{}", "--model.teacher.init_args.model.chat_template_kwargs", "{}")
SHORT = ("--model.rollout.init_args.sampling.max_new_tokens", "3")
WORDS = {
    "off_policy": SHORT,
    "system_prompt": SHORT,
    "cross_size": (*SHORT, *TEACHER, *DATA, *PLAIN),
    "cross_size_cpu": (*SHORT, *TEACHER, *DATA),
    "frozen_lake": (
        *("--model.rollout.init_args.rollout.init_args.sampling.max_new_tokens", "3"),
        *("--model.student.chat_template_kwargs", "{}", "--data.context", "configs/data/quickstart_context.txt"),
        *("--trainer.callbacks", "[]", "--data.val", "null"),
    ),
    "node_8gpu": ("--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"),
}
"""What each recipe takes instead of hubs, several GPUs and long responses."""


def recipes() -> dict[str, Path]:
    """The configs of `opcd fit` by name; those of `opcd experience` have problems, and no model."""
    files = {file.stem: file for file in sorted(CONFIGS.glob("*.yaml"))}
    return {name: file for name, file in files.items() if "problems" not in yaml.safe_load(file.read_text())}


def words(name: str, file: Path, tiny: str, runs: Path) -> list[str]:
    """The words of `opcd fit` for one step: a recipe without rows of its own goes over the quickstart."""
    whole = "train" in yaml.safe_load(file.read_text()).get("data", {})
    files = [file] if whole or name == "cross_size_cpu" else [CONFIGS / "quickstart.yaml", file]
    return [
        *(word for each in files for word in ("--config", str(each))),
        *("--model.student.name", tiny, "--trainer.precision", "bf16-mixed", "--data.batch_size", "2"),
        *("--trainer.max_steps", "1", "--trainer.limit_val_batches", "0", "--trainer.enable_checkpointing", "false"),
        *("--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(runs)),
        *(tiny if word == "TINY" else word for word in WORDS.get(name, ())),
    ]


@pytest.fixture(scope="module")
def found(tiny, tmp_path_factory):
    """The findings of each recipe, made in a process of its own: the device stays registered."""
    runs, roomy = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("models") / "roomy"
    shutil.copytree(tiny, roomy)
    settings = json.loads((roomy / "config.json").read_text())
    (roomy / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 8192}))  # a game is long
    asked = {n: words(n, file, str(roomy), runs) for n, file in recipes().items() if n not in NOT_HERE}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.helpers.simulated.gpu_step"]
    done = subprocess.run(
        command,
        input=json.dumps(asked),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", recipes())
def test_a_step_on_a_gpu(found, name) -> None:
    """Rollout, teacher, loss, backward pass and optimizer, all on one device."""
    if name in NOT_HERE:
        pytest.skip(NOT_HERE[name])
    run = found[name]
    assert run["code"] == 0, run["said"]
    assert "shared prefix does not work" not in run["said"]  # rows are packed, not computed whole
    assert run["steps"] == 1 and run["states"] > 0 and run["devices"] == ["sim:0"]
    assert run["metrics"]["train/divergence"] > 0 and run["metrics"]["train/gradient_norm"] > 0
