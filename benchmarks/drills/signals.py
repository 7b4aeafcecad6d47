"""SIGTERM, SIGINT and SIGUSR1 in the rollout, the teacher's pass, the backward pass, a save and an evaluation."""

import csv
import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.drills.fits import STEPS, Child, Fits, Outcome, metrics, saving, unlike
from opcd.checkpoints import checkpoint_files as files
from opcd.evaluation import Evaluator
from opcd.modules import Distiller
from opcd.modules.lm import generation
from opcd.modules.teachers.base import ModelTeacher

# Place of the signal -> the function, and its approximate number of calls in a run.
PLACES: dict[str, tuple[Any, str, int]] = {
    "rollout": (generation, "draw", STEPS * 8),
    "teacher": (ModelTeacher, "score", STEPS),
    "backward": (Distiller, "manual_backward", STEPS),
    "save": (files, "_write", STEPS // 2),
}
EVERY, ANSWER = 5, 6
"""Steps between two evaluations, and the token limit of their answers, which are one batch."""
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}


def signals(runs: int, folder: Path) -> Outcome:
    """Check the exit code, a checkpoint within 10 seconds, and a bit-equal resume."""
    fits, outcome = Fits(folder), Outcome()
    whole = fits.finished(folder / "whole")
    for number in range(runs):
        place = list(PLACES)[number % len(PLACES)]
        told = list(CODES)[number % len(CODES)]
        outcome.add(_try(fits, whole, folder / f"{place}-{number}", place, told, random.Random(number)))
    return outcome


def _try(fits: Fits, whole: Child, root: Path, place: str, told: signal.Signals, draw: random.Random) -> str | None:
    at = draw.randrange(2, int(PLACES[place][2] * 0.8))
    child = fits.start(root, before=partial(_send_at, place, at, told))
    struck = child.wait_for("STRUCK")
    begun = time.monotonic()
    code, seconds = child.wait(), time.monotonic() - begun
    what = f"{told.name} in {place} {at}"
    if not struck or code != CODES[told] or seconds > 10 or "Traceback" in child.text:
        return f"{what}: exit code {code} after {seconds:.1f} s: {child.text[-400:]}"
    resumed = fits.start(root)
    if resumed.wait() != 0:
        return f"{what}: the resumed run failed: {resumed.text[-400:]}"
    left = child.text.split("STRUCK")[1]
    if place == "rollout" and "RESPONSES" in left:
        return f"{what}: the rollout was written to its end: {left[:200]}"
    return unlike(fits.folder / "whole", whole, root, [child, resumed])


def evaluations(runs: int, folder: Path) -> Outcome:
    """Send SIGTERM and SIGINT in the answers of `LMEval`, also the last ones, and in a validation within training.

    The resume, all answers and the divergences of validations are bit-equal.
    """
    for name in ("lm_eval.evaluator", "lm_eval.tasks", "math_verify"):
        import_module(name)  # once, before the forks
    rows = [{"query": f"What is {n} + {n}? End with 'Answer: N'.", "reference": str(2 * n)} for n in range(4)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"tasks": ["dapo_math"], "data": {"dapo_math": str(folder / "questions.jsonl")}, "max_new_tokens": ANSWER}
    callback = {"class_path": "opcd.callbacks.LMEval", "init_args": {"evaluation": asked, "every_n_steps": EVERY}}
    trainer = saving(2)
    trainer["callbacks"].append(callback)
    trainer |= {"limit_val_batches": 3, "val_check_interval": 4}
    fits, outcome = Fits(folder, trainer=trainer, data={"val": str(folder / "rows.jsonl")}), Outcome()
    whole = fits.finished(folder / "whole")
    last = STEPS // EVERY * ANSWER
    for number in range(runs):
        draw = random.Random(number)
        places = [
            (Evaluator, "__call__", draw.randrange(1, last - ANSWER + 1)),
            (Evaluator, "__call__", draw.randrange(last - ANSWER + 1, last + 1)),
            (Distiller, "validation_step", draw.randrange(1, STEPS // 4 * 3 * 6)),
        ]
        told = (signal.SIGTERM, signal.SIGINT)[number // 3 % 2]
        outcome.add(_within_evaluation(fits, whole, folder / f"evaluation-{number}", places[number % 3], told))
    return outcome


def _within_evaluation(
    fits: Fits, whole: Child, root: Path, place: tuple[type, str, int], told: signal.Signals
) -> str | None:
    what = f"{root.name}: {told.name} in {place[0].__name__}, token {place[2]}"
    child = fits.start(root, before=partial(_send_within, *place, told))
    if child.wait() != CODES[told] or "STRUCK" not in child.text:
        return f"{what}: exit code {child.code}: {child.text[-400:]}"
    resumed = fits.start(root)
    if resumed.wait() != 0:
        return f"{what}: the resumed run failed: {resumed.text[-400:]}"
    expected = measured(fits.folder / "whole")
    if f"step={STEPS}.ckpt" in child.text:  # Lightning does not validate after the last step of a resumed run
        expected = expected[:-1]
    if (found := measured(root)) != expected:
        return f"{what}: measured {found} and not {expected}"
    steps = sorted(step for step, _ in metrics(root))
    if steps != list(range(STEPS)):
        return f"{what}: metrics of the steps {steps}"
    for file in (fits.folder / "whole" / "version_0" / "eval").iterdir():
        if (again := root / "version_1" / "eval" / file.name).read_text() != file.read_text():
            return f"{again}: other answers"
    known = unlike(fits.folder / "whole", whole, root, [child, resumed])
    # A run that is interrupted in its last evaluation has been saved before, and no later step saves again.
    return None if known is not None and known.endswith("differs: /callbacks/LMEval(eval)/main") else known


def measured(root: Path) -> list[dict[str, str]]:
    """The logged metrics of evaluations and validations, in order, of all runs under `root`."""
    found = []
    for file in sorted(root.glob("version_*/metrics.csv")):
        for row in csv.DictReader(file.read_text().splitlines()):
            kept = {name: value for name, value in row.items() if name.startswith(("eval/", "val/")) and value}
            found += [kept | {"step": row["step"]}] if kept else []
    return found


def _send_within(owner: type, name: str, at: int, told: signal.Signals) -> None:
    """Make this process send itself the signal at the `at`-th token that is drawn within a method."""
    method, draw, within, passed = getattr(owner, name), generation.draw, False, 0

    def called(*args: Any, **kwargs: Any) -> Any:
        nonlocal within
        within = True
        try:
            return method(*args, **kwargs)
        finally:
            within = False

    def drawing(*args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        passed += within
        if within and passed == at:
            print("STRUCK", flush=True)
            os.kill(os.getpid(), told)
        return draw(*args, **kwargs)

    setattr(owner, name, called)
    generation.draw = drawing


def _send_at(place: str, at: int, told: signal.Signals) -> None:
    """Make this process send itself the signal at the `at`-th call of the place's function."""
    owner, name, _ = PLACES[place]
    function: Callable[..., Any] = getattr(owner, name)
    passed = 0

    def passing(*args: Any, **kwargs: Any) -> Any:
        nonlocal passed
        passed += 1
        if passed == at:
            print("STRUCK", flush=True)
            os.kill(os.getpid(), told)
        return function(*args, **kwargs)

    setattr(owner, name, passing)


def requeue(runs: int, folder: Path) -> Outcome:
    """Send SIGUSR1 under SLURM (its variables, and a fake `scontrol`): the run is saved, requeued and resumed."""
    fits, outcome = Fits(folder), Outcome()
    whole = fits.finished(folder / "whole")
    scontrol = folder / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        f"#!/bin/sh\nls {folder}/slurm-*/version_0/checkpoints >{folder}/saved\necho $@ >{folder}/asked\n"
    )
    scontrol.chmod(0o755)
    for number in range(runs):
        root = folder / f"slurm-{number}"
        first = fits.start(root, last=False, before=partial(_under_slurm, scontrol, 0))
        first.wait_for("RESPONSES", 5)
        first.strike(signal.SIGUSR1)
        code = first.wait()
        asked, saved = ((folder / name).read_text() if (folder / name).exists() else "" for name in ("asked", "saved"))
        again = fits.start(root, last=False, before=partial(_under_slurm, scontrol, 1))
        if code != 143 or asked != "requeue 42\n" or "step=" not in saved or again.wait() != 0:
            outcome.add(f"exit code {code}, asked {asked!r}, saved {saved!r}: {first.text[-300:]}{again.text[-300:]}")
        else:
            outcome.add(unlike(folder / "whole", whole, root, [first, again]))
        shutil.rmtree(root)
    return outcome


def _under_slurm(scontrol: Path, restarts: int) -> None:
    job = {"JOB_ID": "42", "JOB_NAME": "drill", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    os.environ.update({f"SLURM_{name}": value for name, value in (job | {"RESTART_COUNT": str(restarts)}).items()})
    os.environ["PATH"] = f"{scontrol.parent}:{os.environ['PATH']}"
