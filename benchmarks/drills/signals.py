"""SIGTERM, SIGINT and SIGUSR1 in the rollout, the teacher's pass, the backward pass and a save."""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.drills.fits import STEPS, Child, Fits, Outcome, unlike
from opcd.checkpoints import files
from opcd.modules import Distiller, decoding
from opcd.modules.teacher import ModelTeacher

# Where the signal comes, and about how often that place is passed in a run.
PLACES: dict[str, tuple[Any, str, int]] = {
    "rollout": (decoding, "draw", STEPS * 8),
    "teacher": (ModelTeacher, "score", STEPS),
    "backward": (Distiller, "_backward", STEPS),
    "save": (files, "_write", STEPS // 2),
}
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}


def signals(runs: int, folder: Path) -> Outcome:
    """The exit code, a checkpoint within 10 seconds, and a resume that is bit-equal."""
    fits, outcome = Fits(folder), Outcome()
    whole = fits.start(folder / "whole")
    assert whole.wait() == 0, whole.text
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


def _send_at(place: str, at: int, told: signal.Signals) -> None:
    """Let this process send itself the signal when it passes the place for the `at`-th time."""
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
    """SIGUSR1 under SLURM (its variables, and a `scontrol` of ours): saved, back in the queue, going on by itself."""
    fits, outcome = Fits(folder), Outcome()
    whole = fits.start(folder / "whole")
    assert whole.wait() == 0, whole.text
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
