"""Runs of `opcd fit` on a tiny model, each in a process that a drill can kill, and the comparison of two runs."""

import csv
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.tiny import make_tiny
from opcd.cli.main import main

STEPS, ROWS, BATCH = 20, 16, 2
COMPARED = ("divergence", "gradient_norm", "response_tokens", "student_entropy", "teacher_entropy", "finished_fraction")


@dataclass
class Outcome:
    """The number of tries of a drill and of survivals, and the problems of the others."""

    tried: int = 0
    survived: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, problem: str | None) -> None:
        """Count one try; None means survived."""
        self.tried += 1
        self.survived += problem is None
        if problem is not None:
            self.problems.append(problem)


@dataclass(eq=False)
class Child:
    """A child process, forked after all imports."""

    pid: int
    log: Path
    code: int | None = None

    @classmethod
    def start(cls, action: Callable[[], int], log: Path) -> "Child":
        """Run `action` in a child process, with its output in `log`; its result is the exit code."""
        log.parent.mkdir(parents=True, exist_ok=True)
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return cls(pid, log)
        code = 70
        try:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = action()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 120) -> int:
        """The exit code, or -N if signal N ended the process. The process is killed after `seconds`."""
        end = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                os.kill(self.pid, signal.SIGKILL)
                end = float("inf")
            time.sleep(0.002)
        return self.code

    def wait_for(self, text: str, times: int = 1, seconds: float = 120) -> bool:
        """Wait until the log contains `text` this many times; False if the process ends first."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.log.exists() and self.log.read_text(errors="replace").count(text) >= times:
                return True
            pid, status = os.waitpid(self.pid, os.WNOHANG) if self.code is None else (self.pid, 0)
            if pid:
                self.code = os.waitstatus_to_exitcode(status) if self.code is None else self.code
                return False
            time.sleep(0.002)
        return False

    def strike(self, number: int = signal.SIGKILL) -> None:
        """Send a signal if the process still runs."""
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def text(self) -> str:
        """The output so far."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Fits:
    """Fits of one config in a folder.

    Args:
        folder: an empty folder.
        config: changes to the config, by section.
    """

    def __init__(self, folder: Path, **config: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # In a child process: a process that has computed with torch must not fork.
        model = Child.start(lambda: make_tiny(folder / "tiny", dropout=0.1) and 0, folder / "tiny.log")
        assert model.wait() == 0, model.text
        self.config = folder / "config.yaml"
        settings = _config(folder)
        for section, values in config.items():
            settings[section] |= values
        self.config.write_text(yaml.safe_dump(settings))

    def start(self, root: Path, *words: object, last: bool = True, before: Callable[[], None] | None = None) -> Child:
        """Start `opcd fit` in `root`; `last` resumes from the last checkpoint, `before` runs first in the process."""
        name = f"{root.name}-{time.monotonic_ns()}.log"
        more = [str(word) for word in words]
        command = ["fit", "--config", str(self.config), "--trainer.default_root_dir", str(root)]
        command += ["--ckpt_path", "last"] if last else []

        def action() -> int:
            if before is not None:
                before()
            return main([*command, *more])

        return Child.start(action, self.folder / "logs" / name)

    def finished(self, root: Path, *words: object) -> Child:
        """A run in `root` that has succeeded."""
        child = self.start(root, *words)
        assert child.wait() == 0, child.text
        return child


def saving(every_n_steps: int, **arguments: Any) -> dict[str, Any]:
    """The trainer's section with a checkpoint every n steps, and a record of recovery and drift that is small."""
    arguments["every_n_steps"] = every_n_steps
    few = {"queries": 1, "general_prompts": 1, "max_new_tokens": 2}
    return {
        "callbacks": [
            {"class_path": "opcd.callbacks.SaveCheckpoints", "init_args": arguments},
            {"class_path": "opcd.callbacks.RecoveryAndDrift", "init_args": few},
        ]
    }


def _config(folder: Path) -> dict[str, Any]:
    """A config with all kinds of state: dropout, moving average, mixed rollouts, drawn contexts, rows with contexts."""
    own = "Answer with a number, in one word, and never with more than that; the rule holds for every question"
    rows = [{"query": f"What is {n} + {n}?", **({"context": f"{own} {n}."} if n % 3 == 0 else {})} for n in range(ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "contexts.json").write_text(
        json.dumps([f"The harbour master of Quillhaven is called {name}." for name in ("Odalys", "Brannoc", "Wren")])
    )
    sampling = {"init_args": {"sampling": {"max_new_tokens": 6}}}
    rollouts = [{"class_path": f"opcd.modules.{name}"} | sampling for name in ("StudentRollout", "TeacherRollout")]
    mixed = {"class_path": "opcd.modules.MixedRollout", "init_args": {"rollouts": rollouts, "shares": [0.5, 0.5]}}
    return {
        "seed_everything": 0,
        "model": {
            "student": {"name": str(folder / "tiny")},
            "teacher": {"class_path": "opcd.modules.MovingAverageTeacher", "init_args": {"decay": 0.9}},
            "rollout": {"class_path": "benchmarks.drills.watched.WatchedRollout", "init_args": {"rollout": mixed}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
            "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LinearLR", "init_args": {"total_iters": STEPS}},
            "eval_sampling": {"max_new_tokens": 2},
        },
        "data": {"train": str(folder / "rows.jsonl"), "context": str(folder / "contexts.json"), "batch_size": BATCH},
        "trainer": {
            "max_steps": STEPS,
            "accelerator": "cpu",
            "precision": "32-true",
            "limit_val_batches": 0,
            **saving(2),
        },
    }


def history(child: Child) -> tuple[int, list[str]]:
    """The first step of a run, and the responses of each of its steps."""
    begun = re.findall(r"Restored all states from the checkpoint at .*step=(\d+)\.ckpt", child.text)
    lines = [line for line in child.text.splitlines() if line.startswith("RESPONSES") and line.endswith("]]")]
    return int(begun[-1]) if begun else 0, lines


def metrics(root: Path) -> list[tuple[int, dict[str, str]]]:
    """(step, metrics as written) of every training step of all runs under `root`."""
    found = []
    for file in sorted(root.glob("version_*/metrics.csv")):
        with file.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if None not in row.values()]  # cut lines
        rows = [row for row in rows if row.get("train/divergence")]  # a run with no step left has none
        found += [(int(row["step"]), {name: row[f"train/{name}"] for name in COMPARED}) for row in rows]
    return found


def last_checkpoint(root: Path, steps: int = STEPS) -> dict[str, Any]:
    """The checkpoint after the last step."""
    (path,) = root.glob(f"version_*/checkpoints/step={steps}.ckpt")
    loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def differences(one: object, other: object, path: str = "") -> list[str]:
    """The paths of the values in which two checkpoints differ."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(other, torch.Tensor) and torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict):
        names = one.keys() | other.keys()
        return [d for name in names for d in differences(one.get(name), other.get(name), f"{path}/{name}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        return [d for n, pair in enumerate(zip(one, other, strict=True)) for d in differences(*pair, f"{path}/{n}")]
    return [] if one == other else [path]


def unlike(whole: Path, of_whole: Child, root: Path, children: list[Child]) -> str | None:
    """The first difference between the runs under `root` and the uninterrupted one under `whole`; None if bit-equal."""
    _, all_responses = history(of_whole)
    for child in children:
        begun, responses = history(child)
        if responses != all_responses[begun : begun + len(responses)]:
            return f"{root.name}: other responses after step {begun}"
    expected = dict(metrics(whole))
    for step, row in metrics(root):
        if row != expected[step]:
            return f"{root.name}: other metrics at step {step}: {row} instead of {expected[step]}"
    if found := differences(last_checkpoint(whole), last_checkpoint(root)):
        return f"{root.name}: the last checkpoint differs: {', '.join(found[:3])}"
    return None
