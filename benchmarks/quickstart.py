"""The quickstart's recipe over seeds, precisions and contexts: right answers, recovery and drift.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4                       # all contexts, in this machine's precision
    python benchmarks/quickstart.py --precisions bf16-mixed 32-true         # both precisions
    python benchmarks/quickstart.py --seeds 0 -- --trainer.max_steps 40     # options after -- go to `opcd fit`

Each cell is `opcd fit --config configs/quickstart.yaml` in a separate process. Per cell: right answers to six held-out
questions without the context, before and after; and recovery and drift, as the run itself measures them
(`RecoveryAndDrift`). The tables in docs/log.md up to 2026-11-30 have a drift on eight other prompts.

A finished cell is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = {
    "observatory": ("configs/data/quickstart_{}.jsonl", "configs/data/quickstart_context.txt"),
    "bakery": ("tests/contexts/bakery_{}.jsonl", "tests/contexts/bakery.txt"),
    "ferry": ("tests/contexts/ferry_{}.jsonl", "tests/contexts/ferry.txt"),
}


def sources(context: str) -> tuple[Path, Path, Path]:
    """Training rows, held-out rows and the text."""
    rows, text = CONTEXTS[context]
    return ROOT / rows.format("train"), ROOT / rows.format("val"), ROOT / text


def fit(folder: Path, context: str, seed: int, precision: str | None, others: list[str]) -> None:
    """Train one cell unless it is finished."""
    if (folder / "version_0" / "student" / "model.safetensors").is_file():
        return
    train, val, text = sources(context)
    words = [sys.executable, "-m", "opcd", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
    words += ["--data.train", str(train), "--data.val", str(val), "--data.context", str(text)]
    words += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.enable_checkpointing", "false"]
    words += [*(["--trainer.precision", precision] if precision else []), *others]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{folder} failed:\n{done.stderr[-3000:]}")
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))


def counted(folder: Path) -> dict[str, Any]:
    """The right answers before and after, and the seconds, of a cell."""
    from opcd.results.run_files import read_jsonl, read_metrics
    from opcd.tasks.matching import right

    rows = read_jsonl(folder / "version_0/samples.jsonl")
    last = max(row["step"] for row in rows)
    steps = [seconds for _, seconds in read_metrics(folder / "version_0")["seconds/step"]]
    measured = json.loads((folder / "version_0/recovery.jsonl").read_text().splitlines()[-1])
    alone = [row for row in rows if not row["context"]]
    return {
        "before": sum(right(row) for row in alone if row["step"] == 0),
        "after": sum(right(row) for row in alone if row["step"] == last),
        "in the prompt": sum(right(row) for row in rows if row["context"]),
        "steps": last,
        **{name: measured[name] for name in ("effect", "recovery", "drift")},
        "s a step": statistics.median(steps),
        "s in all": json.loads((folder / "seconds.json").read_text()),
    }


def main() -> None:
    """Train and measure every cell, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=list(CONTEXTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--precisions", nargs="+", default=["auto"], choices=["auto", "32-true", "bf16-mixed"])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_table"))
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, others = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    columns = ("before", "after", "in the prompt", "recovery", "drift", "s a step", "s in all")
    print(f"| context | precision | seed | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}", flush=True)
    for precision in options.precisions:
        for context in options.contexts:
            for seed in options.seeds:
                folder = options.out.resolve() / f"{context}-{precision}-{seed}"
                fit(folder, context, seed, None if precision == "auto" else precision, others)
                found = counted(folder)
                (folder / "cell.json").write_text(json.dumps(found, indent=2))
                shown = [f"{found[name]:.3g}" for name in columns]
                print(f"| {context} | {precision} | {seed} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
