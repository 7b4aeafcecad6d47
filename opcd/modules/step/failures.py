"""Failures of a training step: values that are not finite, and running out of memory."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opcd.data import Batch
from opcd.data.example import ANCHORS
from opcd.modules.step.metrics import PhaseTimer
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.files.disk import write_atomic

KNOBS = {
    "sync": "model.rollout's dtype: bfloat16",
    "rollout": "data.batch_size, rows_at_a_time of model.rollout, or max_new_tokens in its sampling",
    "teacher": "model.micro_batch_tokens, data.max_context_tokens, or model.prefix_memory_mib",
    "student": "model.micro_batch_tokens, or set model.gradient_checkpointing: true",
    "loss": "model.micro_batch_tokens",
    "optimizer": "an optimizer with a smaller state, or a smaller student",
}
"""What to lower, by the phase of the step that ran out of memory."""

NO_MEMORY = ("DefaultCPUAllocator", "can't allocate memory", "CUDA Error: out of memory")
"""What an error says when an allocation failed and the error is of no class for it."""


@dataclass
class OnNonfinite:
    """What happens if the loss, the teacher's states or the gradients are not finite."""

    action: Literal["stop", "skip"] = "stop"
    """stop ends the run; skip continues with the next batch. In both cases the weights do not change."""
    most_in_a_row: int | None = None
    """skip: the most steps in a row that are skipped before the run stops. Default: 3."""

    def __post_init__(self) -> None:
        if self.action == "stop" and self.most_in_a_row is not None:
            raise ValueError("on_nonfinite.most_in_a_row has no effect where on_nonfinite.action is stop; remove it")
        if self.most_in_a_row is not None and self.most_in_a_row < 1:
            raise ValueError(f"on_nonfinite.most_in_a_row must be at least 1, got {self.most_in_a_row}")


@dataclass
class BadSteps:
    """The count of a run's bad steps: those with values that are not finite.

    Attributes:
        settings: the user's.
        total: bad steps so far.
        in_a_row: bad steps since the last good one.
    """

    settings: OnNonfinite
    total: int = 0
    in_a_row: int = 0

    def bad(self, step: int, problem: str, kept: Path) -> None:
        """Count a bad step and warn.

        Raises:
            StepAbandoned: the settings say that the run stops here.
        """
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        most = 0 if self.settings.action == "stop" else self.settings.most_in_a_row or 3
        said = f"after {step} optimizer steps: {problem}; the weights are unchanged, the batch is in {kept}"
        if self.in_a_row <= most:
            rank_zero_warn(f"{said}. The step is skipped (model.on_nonfinite.action: skip)")
            return
        way_out = (
            f"{self.in_a_row} in a row" if most else "model.on_nonfinite.action: skip continues with the next batch"
        )
        raise StepAbandoned(
            f"{said}. {way_out}. A lower learning rate, model.max_nats or --trainer.precision 32-true may help"
        )


def what_is_bad(means: dict[str, float], gradient_norm: Tensor) -> str | None:
    """Name what is not finite among a step's means over tokens and its gradients; None if all values are finite."""
    values = {
        "the teacher's states": means.get("teacher_entropy", 0.0),
        "the student's states": means.get("student_entropy", 0.0),
        "the loss": means["divergence"] + means.get(f"divergence/{ANCHORS}", 0.0),
        "the gradients": float(gradient_norm),
    }
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    return f"not finite: {', '.join(bad)}" if bad else None


def keep_batch(file: Path, batch: Batch, trajectories: Trajectories, problem: str, means: dict[str, float]) -> None:
    """Write the rows, the responses (in a game, one per move) and the means as JSON."""
    rows = [
        {"source": example.source, "query": example.query, "context": context}
        for example, context in zip(batch.examples, batch.contexts, strict=True)
    ]
    responses = [
        {
            "student_prompt_ids": row.student_prompt.tolist(),
            "teacher_prompt_ids": row.teacher_prompt.tolist(),
            "response_ids": row.response.tolist(),
        }
        for row in trajectories.rows
    ]
    means_as_text = {name: str(value) for name, value in means.items()}  # JSON has no NaN
    content: dict[str, Any] = {"problem": problem, "means": means_as_text, "rows": rows, "responses": responses}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(content, ensure_ascii=False, indent=1))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU (by torch, or by vLLM's own allocator) or on a CPU."""
    text = str(error)
    said = isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


@contextmanager
def explain_oom(timer: PhaseTimer, alone: bool) -> Iterator[None]:
    """Turn a failed allocation within a step into a message that names the settings to lower.

    Args:
        timer: knows the phase of the step.
        alone: this is the only rank, so that the state before the step can be saved.

    Raises:
        StepAbandoned: the weights are as before the step, and can be saved.
        UserError: there are other ranks, or the optimizer was running.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        kind = StepAbandoned if alone and timer.phase != "optimizer" else UserError
        raise kind(
            f"out of memory in a step's {timer.phase} ({_reason(error)}); lower {KNOBS[timer.phase]}, and resume with "
            "--ckpt_path last"
        ) from error


def shrinking(run: Callable[[int], None], undo: Callable[[], None], tokens: int, fewest: int) -> int:
    """Call `run(tokens)` with half the tokens after each failed allocation; return the tokens that fit.

    Args:
        run: draws the same random numbers in each attempt.
        undo: removes what a failed attempt has left.
        tokens: of the first attempt.
        fewest: the error is raised if this number does not fit either.
    """
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    while True:
        try:
            run(tokens)
            return tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or tokens <= fewest:
                raise
            reason = _reason(error)
        undo()  # only here: within `except`, the error keeps the frames, and the frames keep the tensors
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)
            torch.cuda.empty_cache()
        tokens = max(fewest, tokens // 2)
        rank_zero_warn(f"out of memory ({reason}): model.micro_batch_tokens is {tokens} from here on")
