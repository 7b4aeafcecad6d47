"""Alarms for runs that go wrong with finite numbers: answers without end, repetition, a student that collapses."""

import math
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from opcd.runtime.errors import StepAbandoned
from opcd.runtime.interruption import Interrupted


class Alarms(Callback):
    """Warns, once each, of what the means over a window of steps say. Nothing is changed: look at samples.jsonl.

    Args:
        window: steps of a window.
        finished_fraction: fewer than this share of responses end by themselves: runaway length where twice as many did
            in the first window, else a limit of tokens under which nothing is learnt of how an answer ends.
        repetition: this share of a response's runs of four tokens has been said before in it.
        entropy: collapse: the student's entropy is below this share of what it was in the first window.
        rollout_logprob_gap: an inference engine that is not the student: in any one step, the mean of
            |log p_S(y) - log p_B(y)| over the tokens that it drew is above this, in nats.
    """

    def __init__(
        self,
        window: int = 20,
        finished_fraction: float = 0.1,
        repetition: float = 0.5,
        entropy: float = 0.1,
        rollout_logprob_gap: float = 0.05,
    ) -> None:
        if window < 1 or not all(0 <= share <= 1 for share in (finished_fraction, repetition, entropy)):
            raise ValueError(
                f"Alarms wants window >= 1 and shares from 0 to 1, got {window}, {finished_fraction}, {repetition}, "
                f"{entropy}"
            )
        self.window, self.finished_fraction, self.repetition, self.entropy = (
            window,
            finished_fraction,
            repetition,
            entropy,
        )
        self.rollout_logprob_gap = rollout_logprob_gap
        self._recent: deque[dict[str, float]] = deque(maxlen=window)
        self._first: dict[str, float] = {}
        self._rung: list[str] = []
        self._looked = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """A step begins that has not been looked at."""
        self._looked = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Look at a step that is done, where a callback before this one was left after it (`LMEval`).

        The checkpoint that is saved then goes on after that step.
        """
        if self._looked or trainer.state.fn != "fit" or not isinstance(exception, Interrupted | StepAbandoned):
            return
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.completed < batches.processed:
            self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Look at the last window."""
        self._looked = True
        self._look_at_gap(trainer)
        names = ("finished_fraction", "repetition", "student_entropy", "response_tokens")
        measured = {name: float(trainer.callback_metrics[f"train/{name}"]) for name in names}
        if not all(map(math.isfinite, measured.values())):
            return  # a bad step, which has a message of its own
        self._recent.append(measured)
        if len(self._recent) < self.window:
            return
        now = {name: sum(step[name] for step in self._recent) / self.window for name in names}
        self._first = self._first or now
        for alarm, said in self._said(now).items():
            if alarm not in self._rung:
                self._rung.append(alarm)
                rank_zero_warn(f"step {trainer.global_step}, mean of {self.window} steps: {said} (samples.jsonl)")

    def _look_at_gap(self, trainer: Trainer) -> None:
        gap = float(trainer.callback_metrics.get("train/rollout_logprob_gap", 0.0))
        if gap > self.rollout_logprob_gap and "rollout_logprob_gap" not in self._rung:
            self._rung.append("rollout_logprob_gap")
            rank_zero_warn(
                f"step {trainer.global_step}: the engine's log-probabilities of the drawn tokens are {gap:.3f} nats "
                "from the student's, in the mean: its weights are stale, or it computes in another precision "
                "(model.rollout's dtype, every_n_steps, importance_clip)"
            )

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs."""
        return {"recent": list(self._recent), "first": self._first, "rung": self._rung}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again."""
        self._recent.extend(state_dict["recent"])
        self._first, self._rung = state_dict["first"], state_dict["rung"]

    def _said(self, now: dict[str, float]) -> dict[str, str]:
        """What is wrong with the means of a window."""
        first, said = self._first, {}
        ends, ended = now["finished_fraction"], first["finished_fraction"]
        if ends < self.finished_fraction and ended < 2 * self.finished_fraction:
            said["limit"] = (
                f"{ends:.0%} of the responses end before their limit of tokens, {ended:.0%} at first: what an answer "
                "ends with is not learnt; a larger max_new_tokens of the rollout shows it"
            )
        elif ends < self.finished_fraction:
            said["ended"] = (
                f"{ends:.0%} of the responses end by themselves, {ended:.0%} did at first; they have "
                f"{now['response_tokens']:.0f} tokens, {first['response_tokens']:.0f} at first"
            )
        if now["repetition"] > self.repetition:
            said["repetition"] = f"{now['repetition']:.0%} of the responses' runs of four tokens are repeated"
        if now["student_entropy"] < self.entropy * first["student_entropy"]:
            said["entropy"] = (
                f"the student's entropy is {now['student_entropy']:.3f} nats a token, {first['student_entropy']:.3f} "
                "at first: it collapses"
            )
        return said
