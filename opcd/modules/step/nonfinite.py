"""Steps whose numbers are not finite: no optimizer step, the batch kept for a look, then stop or go on."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opcd.data import Batch
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import StepAbandoned
from opcd.runtime.files.disk import write_atomic

if TYPE_CHECKING:
    from opcd.modules.distiller import Distiller

FOLDER = "bad_batches"


@dataclass
class OnNonfinite:
    """What happens where the loss, the teacher's states or the gradients are not finite."""

    action: Literal["stop", "skip"] = "stop"
    """stop ends the run; skip goes on with the next batch. Either way the weights stay as they are, to the bit."""
    most_in_a_row: int | None = None
    """skip: how many steps in a row may be skipped before the run is stopped after all. Default: 3."""

    def __post_init__(self) -> None:
        if self.action == "stop" and self.most_in_a_row is not None:
            raise ValueError("on_nonfinite.most_in_a_row has no effect where on_nonfinite.action is stop; remove it")
        if self.most_in_a_row is not None and self.most_in_a_row < 1:
            raise ValueError(f"on_nonfinite.most_in_a_row must be at least 1, got {self.most_in_a_row}")


@dataclass
class BadSteps:
    """Counts the bad steps of a run, and decides what follows.

    Attributes:
        settings: the user's.
        total: bad steps so far.
        in_a_row: bad steps since the last good one.
    """

    settings: OnNonfinite
    total: int = 0
    in_a_row: int = 0

    def good(self) -> None:
        """Note a step that was taken."""
        self.in_a_row = 0

    def bad(self, step: int, problem: str, kept: Path) -> None:
        """Note a step that was not.

        Raises:
            StepAbandoned: the run is to stop.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        most = 0 if self.settings.action == "stop" else self.settings.most_in_a_row or 3
        said = f"after {step} optimizer steps: {problem}; the weights are unchanged, the batch is in {kept}"
        if self.in_a_row <= most:
            rank_zero_warn(f"{said}. The step is skipped (model.on_nonfinite.action: skip)")
            return
        way_out = f"{self.in_a_row} in a row" if most else "model.on_nonfinite.action: skip goes on with the next batch"
        raise StepAbandoned(
            f"{said}. {way_out}. A lower learning rate, model.max_nats or --trainer.precision 32-true may help"
        )


def what_is_bad(means: dict[str, float], gradient_norm: Tensor) -> str | None:
    """What is not finite among a step's means over tokens and its gradients; None where all is."""
    named = {"teacher_entropy": "the teacher's states", "student_entropy": "the student's states"}
    bad = [where for name, where in named.items() if not math.isfinite(means.get(name, 0.0))]
    bad += [] if math.isfinite(means["divergence"]) else ["the loss"]
    bad += [] if math.isfinite(float(gradient_norm)) else ["the gradients"]
    return f"not finite: {', '.join(bad)}" if bad else None


def refuse_step(
    module: "Distiller", batch: Batch, trajectories: Trajectories, means: dict[str, float], problem: str
) -> None:
    """Keep the batch of a step that is not taken, and count it.

    Raises:
        StepAbandoned: the run is to stop.
    """
    trainer, bad = module.trainer, module.bad_steps
    folder = Path(trainer.log_dir or trainer.default_root_dir) / FOLDER
    file = folder / f"step={trainer.global_step}-bad={bad.total}-rank={module.global_rank}.json"
    keep_batch(file, batch, trajectories, problem, means)
    bad.bad(trainer.global_step, problem, file)


def keep_batch(file: Path, batch: Batch, trajectories: Trajectories, problem: str, means: dict[str, float]) -> None:
    """Write the rows, the responses (of a game, one a move) and what was measured as JSON."""
    rows: list[dict[str, Any]] = [
        {"source": example.source, "query": example.query, "context": context}
        for example, context in zip(batch.examples, batch.contexts, strict=True)
    ]
    views = zip(trajectories.student_prompts, trajectories.teacher_prompts, trajectories.responses, strict=True)
    names = ("student_prompt_ids", "teacher_prompt_ids", "response_ids")
    responses = [dict(zip(names, (ids.tolist() for ids in view), strict=True)) for view in views]
    file.parent.mkdir(parents=True, exist_ok=True)
    measured = {name: str(value) for name, value in means.items()}
    whole = {"problem": problem, "means": measured, "rows": rows, "responses": responses}
    write_atomic(file, json.dumps(whole, ensure_ascii=False, indent=1))
