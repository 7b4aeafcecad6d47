"""Drills of what runs beside training: another run in the folder, validation, samples, loggers, a progress bar."""

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.drills.fits import Child, Fits, Outcome, differences, last_checkpoint

TRAINED = ("state_dict", "optimizer_states", "lr_schedulers", "teacher", "exact_resume")


def folder(runs: int, where: Path) -> Outcome:
    """Resume two runs from one folder, one after the other or at once: the second fails and names the first."""
    fits, outcome = Fits(where), Outcome()
    for number in range(runs):
        root, at_once = where / f"both-{number}", number % 2 == 1
        first = fits.start(root)
        if not at_once:
            first.wait_for("RESPONSES")
        second = fits.start(root)
        codes = {child: child.wait() for child in (first, second)}
        outcome.add(_one_refused(first, second, codes, at_once))
        shutil.rmtree(root)
    return outcome


def _one_refused(first: Child, second: Child, codes: dict[Child, int], at_once: bool) -> str | None:
    if at_once and codes[first] == 2:
        first, second = second, first
    if (codes[first], codes[second]) != (0, 2):
        return f"exit codes {codes[first]} and {codes[second]}: {second.text[-300:]}"
    named = f"has not ended (process {first.pid} on " in second.text and "Traceback" not in second.text
    return None if named else f"the first is not named: {second.text[-300:]}"


def beside(runs: int, where: Path) -> Outcome:
    """Compare weights, optimizer and generators of runs with other callbacks and loggers: they are the same."""
    outcome = Outcome()
    samples = {"class_path": "opcd.callbacks.AnswerSamples", "init_args": {"queries": 2, "every_n_steps": 1}}
    variants: list[dict[str, Any]] = [
        {"limit_val_batches": 3, "val_check_interval": 3},
        {"enable_progress_bar": False, "logger": False},
        {"log_every_n_steps": 7, "callbacks": [samples]},
    ]
    fits = Fits(where)
    settings = yaml.safe_load(fits.config.read_text())
    settings["data"]["val"] = settings["data"]["train"]
    fits.config.write_text(yaml.safe_dump(settings))
    fits.finished(where / "plain")
    for number in range(runs):
        overlay = where / f"overlay-{number}.yaml"
        overlay.write_text(yaml.safe_dump({"trainer": variants[number % len(variants)]}))
        root = where / f"watched-{number}"
        child = fits.start(root, "--config", overlay)
        if child.wait() != 0:
            outcome.add(f"{variants[number % len(variants)]}: {child.text[-400:]}")
            continue
        one, other = last_checkpoint(where / "plain"), last_checkpoint(root)
        found = differences({name: one[name] for name in TRAINED}, {name: other[name] for name in TRAINED})
        outcome.add(f"{variants[number % len(variants)]}: {', '.join(found[:3])} differ" if found else None)
    return outcome


def secrets(runs: int, where: Path) -> Outcome:
    """Search all output and files of a run for secrets of the environment: there are none."""
    fits, outcome = Fits(where), Outcome()
    names = ("HF_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY")
    for number in range(runs):
        planted = {name: f"planted-{name.lower()}-{number}-7c1e" for name in names}
        root = where / f"secrets-{number}"
        child = fits.start(root, "--trainer.max_steps", 4, before=partial(os.environ.update, planted))
        code = child.wait()
        written = [file for file in (*root.rglob("*"), child.log) if file.is_file()]
        found = [file for file in written if any(secret.encode() in file.read_bytes() for secret in planted.values())]
        if code != 0 or len(written) < 8:
            outcome.add(f"exit code {code}, {len(written)} files: {child.text[-300:]}")
        else:
            outcome.add(f"found in {', '.join(map(str, found))}" if found else None)
    return outcome
