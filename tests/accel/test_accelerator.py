"""The seam to a device's own code: a device that has none runs none."""

import subprocess
import sys

import torch

from opcd.accel import Accelerator, accelerator
from opcd.accel.cpu.accelerator import CPUAccelerator
from tests.helpers.paths import ROOT

WITHOUT = """
import sys, torch
import opcd, opcd.accel
plain = opcd.accel.Accelerator()
opcd.accel._of_type = lambda kind: plain  # as for a GPU, whose tensors are here on the CPU
from lightning import Trainer
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, StudentRollout
rows, context, tiny, root = sys.argv[1:]
distiller = Distiller(ModelConfig(tiny), rollout=StudentRollout(Sampling(2)), gradient_checkpointing=True)
quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
trainer = Trainer(max_steps=1, accelerator="cpu", default_root_dir=root, **quiet)
trainer.fit(distiller, datamodule=ContextQueryDataModule(train=rows, val=rows, context=context))
assert float(trainer.callback_metrics["train/divergence"]) > 0
print("LOADED", sorted(name for name in sys.modules if name.startswith("opcd.accel.")))
"""


def test_each_device_has_its_own():
    assert type(accelerator("mps")) is type(accelerator("cuda:1")) is Accelerator
    assert type(accelerator(torch.device("cpu"))) is CPUAccelerator


def test_a_run_elsewhere_imports_nothing_of_the_cpus(rows, context, tiny, tmp_path):
    words = [sys.executable, "-c", WITHOUT, str(rows), str(context), tiny, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "LOADED ['opcd.accel.packed_attention'" in done.stdout and "opcd.accel.cpu" not in done.stdout
