"""Warnings about runs that fail with finite numbers: runaway length, repetition, collapse, a stale rollout engine."""

import math
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from opcd.callbacks.recovery_and_drift import RecoveryAndDrift
from opcd.runtime.errors import StepAbandoned
from opcd.runtime.interruption import Interrupted


class Alarms(Callback):
    """Warnings about the training metrics, averaged over a window of steps; each is given once.

    The callback does not change the run. When it warns, look at samples.jsonl.

    Args:
        window: number of steps in a window.
        finished_fraction: warn when a smaller share of responses ends before the token limit, so when more than
            1 - finished_fraction are cut off. If the share was at least twice this value in the first window, the
            warning is about runaway length, else about the limit.
        repetition: warn when a larger share of a response's 4-grams repeats an earlier one of the same response.
        entropy: warn about collapse when the student's entropy falls below this share of its value in the first window.
        rollout_logprob_gap: warn when, in any one step, the mean of |log p_S(y) - log p_B(y)| over the tokens that an
            inference engine drew is larger, in nats.
        drift: warn when the answers to general prompts have moved by more, in nats a token (`RecoveryAndDrift`).
    """

    def __init__(
        self,
        window: int = 20,
        finished_fraction: float = 0.1,
        repetition: float = 0.5,
        entropy: float = 0.1,
        rollout_logprob_gap: float = 0.05,
        drift: float = 0.5,
    ) -> None:
        if window < 1 or not all(0 <= share <= 1 for share in (finished_fraction, repetition, entropy)):
            raise ValueError(
                f"Alarms needs window >= 1 and shares from 0 to 1, got {window}, {finished_fraction}, {repetition}, "
                f"{entropy}"
            )
        self.window, self.finished_fraction, self.repetition = window, finished_fraction, repetition
        self.entropy, self.rollout_logprob_gap, self.drift = entropy, rollout_logprob_gap, drift
        self._recent: deque[dict[str, float]] = deque(maxlen=window)
        self._first: dict[str, float] = {}
        self._rung: list[str] = []
        self._looked = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Mark the new step as not yet checked."""
        self._looked = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Check a finished step whose `on_train_batch_end` was interrupted in an earlier callback (`LMEval`).

        The checkpoint that is saved then resumes after that step.
        """
        if self._looked or trainer.state.fn != "fit" or not isinstance(exception, Interrupted | StepAbandoned):
            return
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.completed < batches.processed:
            self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Check the step, and the means over the last window."""
        self._looked = True
        gap = float(trainer.callback_metrics.get("train/rollout_logprob_gap", 0.0))
        if gap > self.rollout_logprob_gap:
            self._warn(
                "rollout_logprob_gap",
                f"step {trainer.global_step}: on average, the engine's log-probabilities of the drawn tokens are "
                f"{gap:.3f} nats from the student's: its weights are stale, or it computes in another precision "
                "(model.rollout's dtype, every_n_steps, importance_clip)",
            )
        names = ("finished_fraction", "repetition", "student_entropy", "response_tokens")
        measured = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in names}
        if not all(map(math.isfinite, measured.values())):
            return  # a non-finite step has a message of its own
        self._recent.append(measured)
        if len(self._recent) < self.window:
            return
        now = {name: sum(step[name] for step in self._recent) / self.window for name in names}
        self._first = self._first or now
        for alarm, message in self._messages(now).items():
            self._warn(alarm, f"step {trainer.global_step}, mean of {self.window} steps: {message} (samples.jsonl)")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the drift that was just measured."""
        measured = RecoveryAndDrift.last(trainer)
        drift = None if measured is None else measured.drift
        if drift is not None and drift > self.drift:
            self._warn(
                "drift",
                f"step {trainer.global_step}: answers to general prompts have moved by {drift:.2f} nats a token: the "
                "student forgets; a smaller learning rate or fewer steps may help",
            )

    on_fit_end = on_validation_end

    def state_dict(self) -> dict[str, Any]:
        """The window, the first window's means, and the warnings given."""
        return {"recent": list(self._recent), "first": self._first, "rung": self._rung}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of `state_dict`."""
        self._recent.extend(state_dict["recent"])
        self._first, self._rung = state_dict["first"], state_dict["rung"]

    def _warn(self, alarm: str, message: str) -> None:
        if alarm not in self._rung:
            self._rung.append(alarm)
            rank_zero_warn(message)

    def _messages(self, now: dict[str, float]) -> dict[str, str]:
        """Alarm -> message, for the means of a window."""
        first, said = self._first, {}
        ends, ended = now["finished_fraction"], first["finished_fraction"]
        if ends < self.finished_fraction and ended < 2 * self.finished_fraction:
            said["limit"] = (
                f"{1 - ends:.0%} of the responses are cut off at the token limit, {1 - ended:.0%} at first: the "
                "student cannot learn how an answer ends; raise the rollout's max_new_tokens, and if they should have "
                "ended by then, compare the end token of the chat template with eos_token_id in generation_config.json"
            )
        elif ends < self.finished_fraction:
            said["ended"] = (
                f"{1 - ends:.0%} of the responses are cut off at the token limit, {1 - ended:.0%} at first; they have "
                f"{now['response_tokens']:.0f} tokens, {first['response_tokens']:.0f} at first"
            )
        if now["repetition"] > self.repetition:
            said["repetition"] = f"{now['repetition']:.0%} of the responses' runs of four tokens are repeated"
        if now["student_entropy"] < self.entropy * first["student_entropy"]:
            said["entropy"] = (
                f"the student's entropy is {now['student_entropy']:.3f} nats a token, {first['student_entropy']:.3f} "
                "at first: the student collapses"
            )
        return said
