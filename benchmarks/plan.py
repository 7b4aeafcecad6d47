"""The memory that `opcd doctor --plan` predicts, beside the measured peak of `opcd fit`.

    python benchmarks/plan.py                       # all cells, about eight minutes on two cores
    python benchmarks/plan.py lora "lora, long"     # some of them
    python benchmarks/plan.py --measured plan.json  # resumes; predictions are always computed again

Each cell is three steps of the packaged model in a separate process. The peak is the kernel's `ru_maxrss` (VmHWM) of
the finished process. Most cells have responses of a fixed length, so that rows are as long as the plan assumes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

QUICK = ("--config", "configs/quickstart.yaml")
LORA = ("--config", "configs/lora.yaml")
CHECKPOINTING = ("--model.gradient_checkpointing", "true")
LONG = ("--data.train", "configs/data/quickstart_train.jsonl", "--data.context", "{long}")
FIXED = (
    "--model.rollout",
    "{class_path: StudentRollout, init_args: {sampling: {max_new_tokens: 64, options: {min_new_tokens: 64}}}}",
)
CELLS: dict[str, tuple[str, ...]] = {
    "quickstart": (),
    "quickstart, micro-batches of 256 tokens": ("--model.micro_batch_tokens", "256"),
    "64 tokens": FIXED,
    "checkpointing": (*FIXED, *CHECKPOINTING),
    "lora": (*LORA, *FIXED),
    "lora, checkpointing": (*LORA, *FIXED, *CHECKPOINTING),
    "long": (*FIXED, *LONG),
    "checkpointing, long": (*FIXED, *LONG, *CHECKPOINTING),
    "lora, long": (*LORA, *FIXED, *LONG),
}


def words_of(cell: str, folder: Path) -> list[str]:
    """The arguments of `opcd fit`."""
    long = folder / "long.txt"
    long.write_text(" ".join(["river stone lamp garden winter"] * 400) + ".")  # 2,001 tokens
    given = [word.replace("{long}", str(long)) for word in CELLS[cell]]
    return [*QUICK, *given, "--trainer.max_steps", "3", "--trainer.default_root_dir", str(folder / "runs")]


def measured(words: list[str]) -> int:
    """Run a fit. Returns the peak memory of its process in bytes."""
    command = [sys.executable, "-W", "ignore", "-m", "opcd", "fit", *words]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            process.kill()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(output.read().decode()[-3000:])
    return usage.ru_maxrss * 2**10


def all_measured(cells: list[str], folder: Path, file: Path | None) -> dict[str, int]:
    """The peak of each cell in bytes. Cells in the file are not run again."""
    known: dict[str, int] = json.loads(file.read_text()) if file and file.exists() else {}
    for cell in (cell for cell in cells if cell not in known):
        known[cell] = measured(words_of(cell, folder))
        if file:
            file.write_text(json.dumps(known, indent=1))
    return known


def main() -> None:
    """Print one row per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", choices=[*CELLS, []], help="default: all")
    parser.add_argument("--measured", type=Path, help="a file to keep the measurements in")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the running cell too
    cells = options.cells or list(CELLS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        peaks = all_measured(cells, folder, options.measured)
        # Import only now: child processes inherit the peak of this process.
        from opcd.cli.plan import read
        from opcd.planning import parts, peak

        print("| run | predicted MiB | phase | measured MiB | ratio |\n|---|---|---|---|---|")
        process = None
        for cell in cells:
            setting = read(words_of(cell, folder))
            process = process or setting.process  # of the first cell: later reads would add to it
            phase, ours = peak(parts(replace(setting, process=process)))
            row = f"{ours / 2**20:,.0f} | {phase} | {peaks[cell] / 2**20:,.0f} | {ours / peaks[cell]:.2f}"
            print(f"| {cell} | {row} |")


if __name__ == "__main__":
    main()
