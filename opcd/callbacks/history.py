"""The measurements of earlier runs in the folder of a resumed run."""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from opcd.callbacks.log_folder import run_folder
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.files.run_folder import FORMER_METRICS, FROM, METRICS

ANSWERS = re.compile(r"step=(\d+)-.+\.jsonl")


class KeepHistory(Callback):
    """Copies the measurements up to the checkpoint into the folder of a run that resumes from it.

    `metrics_before.csv` has the lines of `metrics.csv` before that step, `eval/` has the answers of `LMEval` up to that
    step, and `resumed_from.json` names the earlier run, so that `opcd report` shows one training. (`AnswerSamples`
    keeps its own.) Nothing is copied if the checkpoint is outside the `checkpoints/` folder of a run.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the run's folder."""
        self._folder = run_folder(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Copy the measurements of the run that the checkpoint belongs to."""
        former = Path(str(trainer.ckpt_path)).absolute().parent.parent
        own = self._folder.absolute()
        if trainer.state.fn != "fit" or not trainer.is_global_zero or former == own:
            return
        if not (former / "config.yaml").is_file():
            return
        step = int(checkpoint["global_step"])
        rows = [row for name in (FORMER_METRICS, METRICS) for row in _rows(former / name)]
        _write_rows(own / FORMER_METRICS, [row for row in rows if _before(row, step)])
        for file in former.glob("*/step=*.jsonl"):
            if (name := ANSWERS.fullmatch(file.name)) and int(name[1]) <= step:
                (own / file.parent.name).mkdir(exist_ok=True)
                shutil.copyfile(file, own / file.parent.name / file.name)
        where = {"run": os.path.relpath(former, own), "step": step}
        write_atomic(own / FROM, json.dumps(where) + "\n")


def _rows(file: Path) -> list[dict[str, str]]:
    """The complete lines of a table; a killed run may have cut the last one."""
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8", errors="replace") as stream:
        found = list(csv.DictReader(stream))
    return [row for row in found if None not in row and None not in row.values() and row.get("step", "").isdigit()]


def _before(row: dict[str, str], step: int) -> bool:
    """Whether a line was logged before the checkpoint of `step`; the first training step is logged as step 0.

    `LMEval` logs the number of finished steps, so its line of the same number counts.
    """
    return int(row["step"]) < step or (int(row["step"]) == step and not row.get("train/divergence"))


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    if rows:
        names = list(dict.fromkeys(name for row in rows for name in row))
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
