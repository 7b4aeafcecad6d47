"""The cost of checkpoints: seconds of a save with its manifest, beside seconds of a step of the quickstart.

    python benchmarks/saving.py --steps 6

Trains the quickstart with a checkpoint after every second step. A checkpoint has float32 weights and both moments of
AdamW. Shares of a step are given for the default of one checkpoint every 100 steps, and for one in the quickstart.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from opcd.callbacks import SaveCheckpoints
from opcd.cli.main import main
from opcd.modules import Distiller

CADENCE, QUICKSTART = 100, 60


def timed(owner: Any, name: str, seconds: list[float]) -> None:
    """Record the seconds of each call of a method."""
    method = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        begun = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - begun)

    setattr(owner, name, call)


def run() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    steps: list[float] = []
    calls: list[float] = []
    timed(Distiller, "training_step", steps)
    timed(SaveCheckpoints, "save", calls)
    with tempfile.TemporaryDirectory() as folder:
        overlay = Path(folder) / "saving.yaml"
        saving = {"class_path": "opcd.callbacks.SaveCheckpoints", "init_args": {"every_n_steps": 2}}
        overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [saving], "max_steps": options.steps}}))
        words = ["fit", "--config", "configs/quickstart.yaml", "--config", str(overlay)]
        code = main([*words, "--trainer.default_root_dir", folder])
        sizes = [file.stat().st_size for file in Path(folder).rglob("*.ckpt")]
    saves = [seconds for seconds in calls if seconds > 0.01]  # the last call finds nothing to save
    if code == 0:
        step, save = statistics.median(steps[1:]), statistics.median(saves)
        print(f"\n{len(steps)} steps, median {step:.2f} s; {len(saves)} checkpoints of {max(sizes) / 2**20:.0f} MiB, ")
        print(f"median {save:.2f} s ({min(saves):.2f} to {max(saves):.2f})")
        for name, every in ((f"every {CADENCE} steps", CADENCE), (f"one in the quickstart's {QUICKSTART}", QUICKSTART)):
            print(f"{name}: {save / every / step:.1%} of a step")
    return code


if __name__ == "__main__":
    sys.exit(run())
