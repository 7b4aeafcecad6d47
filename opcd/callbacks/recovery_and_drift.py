"""How much of the context's effect is in the weights, and how far other answers have moved.

How it works:
    1. before training, the teacher answers held-out queries with the context, and the student general prompts without
    2. the likeliest tokens of each position are recorded, as p_T(. | c, x, y<t) and p_base(. | x, y<t) rank them
    3. the student of any later step is compared with both records: one forward pass over the same responses
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from opcd.callbacks.log_folder import run_folder, still_there
from opcd.data import Batch, ContextQueryDataModule
from opcd.data.batch import Row
from opcd.data.example import Example
from opcd.evaluation.intervals import bootstrap
from opcd.models import context_window
from opcd.modules import Distiller, Sampling, Student, Trajectories
from opcd.modules.fixed_responses import Divergences, FixedResponses
from opcd.modules.lm.generation import computing_dtype, generate
from opcd.modules.step.runner import use_weights
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.files.disk import append_lines
from opcd.runtime.interruption import doing
from opcd.tasks.matching import right

FILE = "recovery.jsonl"
GENERAL = Path(__file__).with_name("general_prompts.jsonl")
LOGGED = (
    *("effect", "left", "recovery", "recovery_low", "recovery_high"),
    *("drift", "drift_low", "drift_high"),
)
SHOWN = ("context/recovery", "context/drift")
"""What the progress display has."""
NO_EFFECT = 0.02
"""Nats a token under which a context has no effect to speak of: recovery, a share of it, is not computed."""


@dataclass(frozen=True)
class Measurement:
    """A line of `recovery.jsonl`: nats a token but for `recovery`, a share. None: not measured.

    The intervals are 95 % bootstrap intervals over responses.
    """

    step: int
    split: str
    """Of the queries: val or train."""
    queries: int
    effect: float | None = None
    left: float | None = None
    recovery: float | None = None
    recovery_low: float | None = None
    recovery_high: float | None = None
    prompts: int = 0
    drift: float | None = None
    drift_low: float | None = None
    drift_high: float | None = None

    @property
    def logged(self) -> dict[str, float]:
        """What loggers and monitors get."""
        values = {f"context/{name}": getattr(self, name) for name in LOGGED}
        return {name: value for name, value in values.items() if value is not None}

    def in_words(self) -> dict[str, str]:
        """Recovery and drift with their intervals; what was not measured is left out."""
        words = {}
        if self.recovery is not None:
            interval = _interval(self.recovery_low, self.recovery_high, "{:.0%}")
            words["recovery"] = f"{self.recovery:.0%}{interval}, on {self.queries} queries of data.{self.split}"
        if self.drift is not None:
            interval = _interval(self.drift_low, self.drift_high, "{:.3f}")
            words["drift"] = f"{self.drift:.3f}{interval}, on {self.prompts} general prompts"
        return words

    def sentence(self) -> str:
        """What a reader wants to know at the end of a run."""
        words, parts = self.in_words(), []
        if self.recovery is not None:
            nats = f"{self.effect:.3f} nats a token at the start, {self.left:.3f} left"
            parts.append(f"the context's effect in the weights: {words['recovery']} ({nats})")
        elif self.effect is not None:
            parts.append(f"the context changes the teacher's answers by {self.effect:.3f} nats a token only")
        if self.drift is not None:
            parts.append(f"drift: {words['drift']}, nats a token")
        return "; ".join(parts) or "recovery and drift were not measured"


class RecoveryAndDrift(Callback):
    """Measures recovery and drift at the start, after every validation and at the end.

    Both come from KL divergences in nats a token, at temperature 1, on responses that are written once, greedily,
    before training. No labels are needed:

    * effect = KL(p_T(c) || p_base) and left = KL(p_T(c) || p_S) on the teacher's answers with the context to held-out
      queries (training queries where data.val is not set). recovery = 1 - left / effect: the share of the context's
      effect that is in the weights.
    * drift = KL(p_base || p_S) on the answers of the student as it was before training to general prompts, which have
      nothing to do with the context.

    Before training, a Cartridge holds keys and values of the context already: base is the student without it.

    Each measurement is a line of `recovery.jsonl` in the run's folder (`Measurement`), and is logged as
    `context/effect`, `context/left`, `context/recovery` and `context/drift`.

    Args:
        queries: how many queries, the first ones of data.val (of data.train where that is not set).
        general_prompts: how many of the package's general prompts; 0: no drift.
        max_new_tokens: most tokens of a response.
    """

    def __init__(self, queries: int = 32, general_prompts: int = 16, max_new_tokens: int = 24) -> None:
        most = len(_general_prompts())
        if queries < 1 or max_new_tokens < 1 or not 0 <= general_prompts <= most:
            raise ValueError(
                f"RecoveryAndDrift wants queries >= 1, general_prompts from 0 to {most} and max_new_tokens >= 1, got "
                f"{queries}, {general_prompts}, {max_new_tokens}"
            )
        self.queries, self.general_prompts = queries, general_prompts
        self.sampling = Sampling(max_new_tokens, temperature=0.0)
        self.measured: list[Measurement] = []
        self._former: dict[str, Any] | None = None
        self._clear()

    def _clear(self) -> None:
        self._taught: FixedResponses | None = None
        self._general: FixedResponses | None = None
        self._effect: Divergences | None = None
        self._unchanged = True
        self._split = "val"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder to write to."""
        self._file = run_folder(trainer) / FILE

    @staticmethod
    def last(trainer: Trainer) -> Measurement | None:
        """The last measurement of a trainer's callback; None where there is none."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [one for callback in callbacks if isinstance(callback, RecoveryAndDrift) for one in callback.measured]
        return found[-1] if found else None

    def state_dict(self) -> dict[str, Any]:
        """The responses, what was recorded on them, and all measurements: a resumed run compares with its start."""
        return {
            "taught": self._taught and self._taught.state_dict(),
            "general": self._general and self._general.state_dict(),
            "effect": self._effect and asdict(self._effect),
            "measured": [asdict(one) for one in self.measured],
            "split": self._split,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the device is known."""
        self._former = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the responses and measure the effect; a resumed run takes up those of its checkpoint."""
        assert isinstance(pl_module, Distiller)
        if self._former is not None:
            self._resume(trainer, self._former, pl_module.device)
            self._former = None
        elif trainer.global_step:
            rank_zero_info("recovery and drift are not measured: the checkpoint does not hold what the run began with")
        else:
            self._begin(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, and log for monitors such as EarlyStopping and for the progress display."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self.measured:
            self._measure_once(trainer, pl_module)
            for name, value in self.measured[-1].logged.items():
                pl_module.log(name, value, logger=False, prog_bar=name in SHOWN, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the last weights."""
        self._measure_once(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what came out, when the student is on the disk."""
        if self.measured:
            rank_zero_info(self.measured[-1].sentence())

    def _resume(self, trainer: Trainer, former: dict[str, Any], device: torch.device) -> None:
        taught, general, effect = former["taught"], former["general"], former["effect"]
        self._taught = taught and FixedResponses.from_state_dict(taught, device)
        self._general = general and FixedResponses.from_state_dict(general, device)
        self._effect = effect and Divergences(**effect)
        self._split, self.measured = former["split"], []
        for values in former["measured"]:
            self._keep(trainer, Measurement(**values))

    def _begin(self, trainer: Trainer, distiller: Distiller) -> None:
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, ContextQueryDataModule):
            raise UserError(
                "RecoveryAndDrift needs a ContextQueryDataModule: remove the callback or pass one to the trainer"
            )
        with _computing(trainer, distiller):
            dtype = computing_dtype(trainer.precision, distiller.student.model.dtype)
            batch = self.record(distiller, datamodule, dtype)
        self._measure(trainer, distiller)
        if self._taught is not None:
            self._say_what_the_teacher_does(distiller, batch)

    def record(self, distiller: Distiller, data: ContextQueryDataModule, dtype: torch.dtype) -> Batch:
        """Write the responses, and record what the teacher and the student as it is now say about them.

        Args:
            distiller: with its student and teacher; it needs no trainer.
            data: set up for its validation rows, or training rows if there are none.
            dtype: the type that the student writes in.

        Returns:
            The queries.
        """
        self._clear()
        self._split, self.measured = "val" if data.sources["val"] else "train", []
        former = distiller.student.without_cartridge()
        batch = data.encode(data.examples(self._split)[: self.queries]).to(former.model.device)
        writer = former.plain(dtype)
        try:
            self._taught = self._responses_with_context(distiller, writer, batch)
        except StepAbandoned:
            raise  # a server that is away
        except (UserError, ValueError) as error:
            rank_zero_info(f"recovery is not measured with {type(distiller.teacher).__name__}: {error}")
        if self.general_prompts:
            self._general = self._general_responses(distiller, former, writer, batch)
        self._unchanged = former is distiller.student
        if not self._unchanged and self._taught is not None:  # a Cartridge has an effect before it is trained
            self._effect = self._taught.divergences(former, distiller.micro_batch_tokens)
        return batch

    @torch.no_grad()
    def _responses_with_context(self, distiller: Distiller, writer: Student, batch: Batch) -> FixedResponses:
        """The teacher's answers; of one that does not write, the student's with the context in the prompt."""
        teacher, student = distiller.teacher, distiller.student
        doing("recovery: answers with the context", f"{len(batch)} queries")
        use_weights(distiller)
        teacher.sync_weights(student)
        if teacher.writes:
            responses = teacher.generate(batch, self.sampling, student.eos_ids, student.pad_id)
        else:
            responses = self._written(distiller, writer, batch.teacher_prompts)
        trajectories = Trajectories.of(batch, responses, student.eos_ids)
        with teacher.session(trajectories):
            said = teacher.score(trajectories, distiller.micro_batch_tokens)
        return FixedResponses.of(trajectories, said, student.vocabulary)

    def _general_responses(
        self, distiller: Distiller, former: Student, writer: Student, batch: Batch
    ) -> FixedResponses:
        """The answers of the student before training to general prompts."""
        doing("drift: answers to general prompts", f"{self.general_prompts} prompts")
        views = next(iter(batch.views.values()))
        texts = _general_prompts()[: self.general_prompts]
        examples = [Example(text, None, None, None, number, GENERAL.name) for number, text in enumerate(texts)]
        prompts = Batch([Row.encoded(example, None, views) for example in examples], batch.views).to(distiller.device)
        responses = self._written(distiller, writer, prompts.student_prompts)
        trajectories = Trajectories.of(prompts, responses, former.eos_ids)
        return FixedResponses.of_student(former, trajectories, distiller.micro_batch_tokens)

    def _written(self, distiller: Distiller, writer: Student, prompts: list[Tensor]) -> list[Tensor]:
        """Responses of the student's weights, as many rows at a time as fit a micro-batch."""
        longest = max(map(len, prompts)) + self.sampling.max_new_tokens
        window = context_window(distiller.student_config, "model.student")
        if window is not None and longest > window:
            raise UserError(f"a prompt and its response have {longest} tokens, and the student's window is {window}")
        rows = max(1, distiller.micro_batch_tokens // longest)
        written: list[Tensor] = []
        for first in range(0, len(prompts), rows):
            part = prompts[first : first + rows]
            written += generate(writer.model, part, self.sampling, writer.eos_ids, writer.pad_id)
        return written

    def _measure_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.measured and self.measured[-1].step != trainer.global_step:
            self._measure(trainer, pl_module)

    def compare(self, distiller: Distiller, step: int) -> Measurement:
        """Compare the student with both records; the first time, it must be the one at `record`."""
        found: dict[str, Any] = {}
        student, most = distiller.student, distiller.micro_batch_tokens
        if self._taught is not None:
            left = self._taught.divergences(student, most)
            self._effect = self._effect or left
            found |= _recovery(self._effect, left)
        if self._general is not None:
            recorded = self._unchanged and not self.measured
            drift = None if recorded else self._general.divergences(student, most)
            found |= {"prompts": len(self._general)} | _drift(drift)
        return Measurement(step, self._split, 0 if self._taught is None else len(self._taught), **found)

    def _measure(self, trainer: Trainer, distiller: Any) -> None:
        doing("recovery and drift")
        with _computing(trainer, distiller):
            measurement = self.compare(distiller, trainer.global_step)
        self._keep(trainer, measurement)
        for logger in trainer.loggers:
            logger.log_metrics(self.measured[-1].logged, step=trainer.global_step)

    def _keep(self, trainer: Trainer, measurement: Measurement) -> None:
        self.measured.append(measurement)
        if trainer.is_global_zero:
            still_there(self._file.parent)
            append_lines(self._file, json.dumps(asdict(measurement)) + "\n")

    def _say_what_the_teacher_does(self, distiller: Distiller, batch: Batch) -> None:
        """The context's effect, and how often the teacher is right; a warning where there is little to learn."""
        assert self._taught is not None and self._effect is not None
        decode, rows = distiller.student.tokenizer.decode, self._taught.rows
        known = [
            right({"answer": decode(row.response, skip_special_tokens=True), "reference": example.reference})
            for row, example in zip(rows, batch.examples, strict=True)
            if example.reference is not None
        ]
        effect, remedy = self._effect.mean, "try another wording of the context, or a larger teacher (model.teacher)"
        share = f"the teacher is right on {sum(known)} of {len(known)} queries"
        change = f"the context changes its answers by {effect:.3f} nats a token"
        rank_zero_info(f"with the context, {f'{share}; ' if known else ''}{change} (data.{self._split})")
        if effect < NO_EFFECT:
            rank_zero_warn(f"{change}: there is hardly anything to learn; {remedy}")
        if known and sum(known) < len(known) / 2:
            rank_zero_warn(f"with the context, {share}, and the student learns its answers; {remedy}")


@contextmanager
def _computing(trainer: Trainer, distiller: Distiller) -> Iterator[None]:
    """The trainer's precision, with torch's random state left as it is."""
    devices = [distiller.device] if distiller.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), trainer.precision_plugin.forward_context():
        yield


def _recovery(effect: Divergences, left: Divergences) -> dict[str, float | None]:
    """The fields of a `Measurement` that come from the teacher's answers."""
    if not effect.is_finite or not left.is_finite:
        return {}
    found = {"effect": effect.mean, "left": left.mean}
    if effect.mean < NO_EFFECT:
        return dict(found)
    low, high = bootstrap(left.nats, effect.nats) or (None, None)
    return found | {
        "recovery": 1 - left.mean / effect.mean,
        "recovery_low": None if high is None else 1 - high,
        "recovery_high": None if low is None else 1 - low,
    }


def _drift(drift: Divergences | None) -> dict[str, float | None]:
    """The fields of a `Measurement` that come from the general prompts; None: of the weights that were recorded."""
    if drift is None:
        return {"drift": 0.0}
    if not drift.is_finite:
        return {}
    low, high = bootstrap(drift.nats, drift.tokens) or (None, None)
    return {"drift": drift.mean, "drift_low": low, "drift_high": high}


def _interval(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None else f" (95 %: {form.format(low)} to {form.format(high)})"


@cache
def _general_prompts() -> list[str]:
    """The package's general prompts, in an order in which the first few already cover many topics."""
    rows = [json.loads(line) for line in GENERAL.read_text(encoding="utf-8").splitlines()]
    return [row["query"] for row in rows]
