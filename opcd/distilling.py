"""One call from Python: a context goes into a model's weights.

    result = opcd.distill("smollm2-135m", "The harbour master of Quillhaven is Odalys. ...")

How it works:
    1. without queries, they are written and tried out, as `opcd queries` does
    2. the recipe is that of `opcd init` for this kind of context; arguments replace its values
    3. Distiller, ContextQueryDataModule and Trainer are made of it, with the callbacks of `opcd fit`

What needs the command stays there: checkpoints to resume from, exit codes, several GPUs.
"""

import gc
import random
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any, Literal, get_args

import numpy as np
import torch
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.accel.precision import trainer_precision
from opcd.callbacks import AnswerSamples, ExportStudent, RecoveryAndDrift, default_callbacks
from opcd.callbacks.export_student import facts_of, own_dtype, write_card
from opcd.callbacks.log_folder import RunLogger
from opcd.callbacks.recovery_and_drift import Measurement
from opcd.checkpoints import SafeCheckpointIO
from opcd.cli import queries as asking
from opcd.cli.fit import TRAINER_DEFAULTS
from opcd.cli.init import RECIPE, STARTER, steps_for
from opcd.data import ContextQueryDataModule, Example, ExampleSource, Views, read_contexts
from opcd.losses import Loss
from opcd.models import ModelConfig
from opcd.models.model_card import Facts
from opcd.modules import (
    BaseTeacher,
    Cartridge,
    Distiller,
    FrozenTeacher,
    Lora,
    Rollout,
    Sampling,
    Student,
    Teacher,
)
from opcd.modules.distributed.fsdp_strategy import wait_for_rollouts
from opcd.modules.lm.adapters import has_adapter
from opcd.queries.documents import read_documents
from opcd.queries.making import kind_of
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import whole_folder
from opcd.runtime.files.run_folder import METRICS, RunFolder
from opcd.runtime.generators import generators_kept
from opcd.runtime.interruption import leaving_at_once
from opcd.tasks.matching import right

Rows = str | Path | ExampleSource | Iterable[Any]
"""Rows as `ContextQueryDataModule` takes them: a file, a list of queries or of dictionaries, a `datasets.Dataset`."""


Kind = Literal["auto", "facts", "manner"]


@dataclass(repr=False)
class Result:
    """A trained student, and what was measured on the way.

    Attributes:
        student: the model, on the CPU; of a run with an adapter, the base with the adapter in it.
        tokenizer: its tokenizer, with the chat template.
        measured: the lines of `recovery.jsonl`: recovery and drift at the start and at the end, with their intervals.
        samples: the lines of `samples.jsonl`: answers before and after training, and, before it, with the context.
        train: the training rows. Give them as `queries` to train again on the same questions.
        val: the held-out rows; None: there were none.
        folder: the folder of the run; None: none was kept.
    """

    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    measured: list[Measurement]
    samples: list[dict[str, Any]]
    train: Rows
    val: Rows | None
    folder: Path | None
    _facts: Facts
    _dtype: torch.dtype | None
    _views: Views
    _sampling: Sampling

    @property
    def recovery(self) -> float | None:
        """The share of the context's effect that is in the weights; None: not measured."""
        return self.measured[-1].recovery if self.measured else None

    @property
    def drift(self) -> float | None:
        """How far answers to general prompts have moved, in nats a token; None: not measured."""
        return self.measured[-1].drift if self.measured else None

    @property
    def before(self) -> list[dict[str, Any]]:
        """The samples without the context before training."""
        return [row for row in self.samples if row["step"] == 0 and not row["context"]]

    @property
    def after(self) -> list[dict[str, Any]]:
        """The samples without the context after training."""
        return [row for row in self.samples if row["step"] == self._facts.steps and not row["context"]]

    def answer(self, query: str) -> str:
        """The student's answer without the context, greedy and as long as the samples are."""
        prompt = self._views.student_prompt(Example(query, None, None, None, 0, "query"))
        return Student(self.student, self.tokenizer).answer([torch.tensor(prompt)], self._sampling)[0]

    def save(self, folder: str | Path) -> None:
        """Write the folder that `opcd fit` calls `student/`: weights (or the adapter), tokenizer, model card.

        Raises:
            UserError: the folder holds other files.
        """
        with whole_folder(Path(folder).expanduser(), "folder") as scratch:
            Student(self.student, self.tokenizer).save(scratch, self._dtype)
            write_card(scratch, self._facts, has_adapter(self.student))

    def __repr__(self) -> str:
        """Recovery, drift and the counts of right answers, in words."""
        lines = [f"{self._facts.base} after {self._facts.steps} steps"]
        lines += [self.measured[-1].sentence()] if self.measured else []
        before, after = ([row for row in rows if row["reference"] is not None] for rows in (self.before, self.after))
        if after:
            counts = f"{sum(map(right, before))} before, {sum(map(right, after))} after"
            lines.append(f"right without the context, of {len(after)} sampled questions: {counts}")
        return "\n".join(lines)


def distill(
    model: str | ModelConfig,
    context: str | Path,
    queries: Rows | None = None,
    *,
    val: Rows | None = None,
    teacher: str | ModelConfig | Teacher | None = None,
    loss: Loss | None = None,
    rollout: Rollout | None = None,
    adapter: Lora | Cartridge | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    batch_size: int | None = None,
    kind: Kind = "auto",
    seed: int = 0,
    folder: str | Path | None = None,
    callbacks: Sequence[Callback] = (),
    **trainer: Any,
) -> Result:
    """Put a context into a model's weights.

    What is None comes from the recipe that `opcd init --kind KIND` writes. The random generators, signal handlers and
    environment of the process are afterwards what they were before.

    Args:
        model: the student: a name, folder or hub id, or a ModelConfig.
        context: the text, or the Path of a document.
        queries: the training rows; None: they are written by the teacher's model and tried out on the student, as
            `opcd queries` does. That takes minutes.
        val: rows to measure recovery on and to sample answers to. None: 16 of the written ones; where you give
            `queries`, those.
        teacher: the model that sees the context. None: the student before training.
        loss: the divergence.
        rollout: what writes the responses.
        adapter: train this adapter in place of the weights. Its base is then the teacher, unless you give another.
        steps: optimizer steps. None: the recipe's; for facts, six passes over the rows, and 36 at least.
        learning_rate: of AdamW. An adapter wants a larger one than the recipe's: configs/lora.yaml has 1e-3.
        batch_size: queries a step.
        kind: what the context holds, facts or a manner to answer in; auto: told from its sentences.
        seed: of all draws.
        folder: keep the run in a new folder version_N in this one, as `opcd fit` does, and written queries beside it:
            the same call goes on from them. None: files are temporary.
        callbacks: more callbacks. One of a class of `opcd.callbacks.default_callbacks` replaces that one.
        trainer: more arguments of Lightning's Trainer, such as accelerator, precision, enable_progress_bar or logger.

    Raises:
        UserError: an argument, a row or the model is wrong; the message says what to do.
    """
    text = _text(context)
    if kind not in (kinds := get_args(Kind)):
        raise UserError(f"kind must be one of {', '.join(kinds)}, not {kind!r}")
    kind = kind_of(text) if kind == "auto" else kind
    recipe = _recipe(kind, learning_rate, batch_size, steps)
    parts: dict[str, Any] = {"loss": loss, "rollout": rollout, "adapter": adapter}
    parts |= {"student": _config(model, "model"), "teacher": _teacher(teacher, adapter)}
    with _run_folder(folder) as run, generators_kept():

        def made() -> tuple[Distiller, Trainer]:
            """Both, as the recipe is now."""
            fitting = _trainer(recipe["trainer"], trainer, callbacks, run, folder is not None)
            return _distiller(recipe["model"], parts), fitting

        distiller, fitting = made()  # a wrong argument is told before minutes of writing
        rows: dict[str, Any] = {"train": queries, "val": val, "context": [text]}
        if queries is None:
            rows = _written(text, kind, distiller, seed, val, run.parent, str(trainer.get("accelerator")))
        rows |= {name: recipe["data"][name] for name in ("placement", "batch_size")}
        readers = getattr(distiller.teacher, "models", distiller.teacher.config)
        data = ContextQueryDataModule(**rows, seed=seed, student=distiller.student_config, teacher=readers)
        if steps is None and kind == "facts":
            data.setup("fit")
            _set_steps(recipe, steps_for(len(data.examples("train")), data.batch_size))
            distiller, fitting = made()
        _seed(seed)
        with leaving_at_once(signal.SIGINT, handler=_stop):
            fitting.fit(distiller, datamodule=data)
    result = _result(fitting, distiller, data, None if folder is None else run)
    del fitting, distiller, data  # they refer to one another: the teacher and the optimizer would stay in memory
    gc.collect()
    return result


def _recipe(kind: str, learning_rate: float | None, batch_size: int | None, steps: int | None) -> dict[str, Any]:
    """The recipe of `opcd init` for this kind of context, with the values that are given."""
    recipe: dict[str, Any] = yaml.safe_load((STARTER / kind / RECIPE).read_text(encoding="utf-8"))
    if learning_rate is not None:
        recipe["model"]["optimizer"]["init_args"]["lr"] = learning_rate
    recipe["data"] |= {} if batch_size is None else {"batch_size": batch_size}
    _set_steps(recipe, recipe["trainer"]["max_steps"] if steps is None else steps)
    return recipe


def _set_steps(recipe: dict[str, Any], steps: int) -> None:
    recipe["trainer"]["max_steps"] = steps
    if scheduler := recipe["model"].get("lr_scheduler"):
        scheduler["init_args"]["total_iters"] = steps


def _text(context: object) -> str:
    """The text of a context, or of the document at a Path."""
    if isinstance(context, Path):
        return read_documents([str(context)], "context")[0].text
    if not isinstance(context, str):
        raise UserError(f"context must be a text, or a pathlib.Path of a document, not {type(context).__name__}")
    return read_contexts([context], "context")[0]


def _config(model: object, name: str) -> ModelConfig:
    if isinstance(model, ModelConfig):
        return model
    if isinstance(model, str | Path):
        return ModelConfig(str(model))
    loaded = ""
    if isinstance(model, PreTrainedModel):
        loaded = ": save model and tokenizer with save_pretrained(folder), and give the folder"
    raise UserError(f"{name} must be a name, a folder, a hub id or a ModelConfig, not {type(model).__name__}{loaded}")


def _teacher(given: str | ModelConfig | Teacher | None, adapter: Lora | Cartridge | None) -> Teacher | None:
    if isinstance(given, Teacher):
        return given
    if given is None:
        return None if adapter is None else BaseTeacher()  # the same distribution as a frozen copy, with no copy
    return FrozenTeacher(_config(given, "teacher"))


def _distiller(section: dict[str, Any], given: dict[str, Any]) -> Distiller:
    """The Distiller of a recipe's section `model`, with the objects that are given in place of its own."""
    kinds: dict[str, tuple[type, ...]] = {"loss": (Loss,), "rollout": (Rollout,), "adapter": (Lora, Cartridge)}
    for name, classes in kinds.items():
        if given[name] is not None and not isinstance(given[name], classes):
            raise UserError(f"{name} must be an object of a class of {classes[0].__module__}, not {given[name]!r}")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Distiller, "model", instantiate=False)
    made = parser.instantiate(parser.parse_object({"model": section})).model
    try:
        return Distiller(**vars(made) | {name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(str(error)) from error


class _Stopped(BaseException):
    """Ctrl-C while a trainer fits: at a KeyboardInterrupt, Lightning would end the process."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stopped


@contextmanager
def _run_folder(folder: str | Path | None) -> Iterator[Path]:
    """A locked folder for a run, removed if it ends before its first step; without `folder` a temporary one."""
    with tempfile.TemporaryDirectory(prefix="opcd-") as temporary:
        run = RunFolder.claim(Path(temporary) if folder is None else Path(folder).expanduser().absolute())
        try:
            yield run.path
        except BaseException as error:
            if not (run.path / METRICS).exists():
                shutil.rmtree(run.path, ignore_errors=True)
            if isinstance(error, _Stopped):
                raise KeyboardInterrupt from error
            raise
        finally:
            run.release()


def _trainer(
    recipe: dict[str, Any], given: dict[str, Any], callbacks: Sequence[Callback], run: Path, is_kept: bool
) -> Trainer:
    """The Trainer of a recipe's section `trainer`, with the arguments that are given in place of its own."""
    for name, ours in {"max_steps": "steps", "default_root_dir": "folder"}.items():
        if name in given:
            raise UserError(f"{name} of the Trainer is called {ours} here")
    if recipe["max_steps"] < 1:
        raise UserError(f"steps must be at least 1, not {recipe['max_steps']}")
    loggers = given.get("logger") or []
    everyone = default_callbacks(
        *callbacks,
        progress=given.get("enable_progress_bar") is not False,
        checkpoints=False,
    )
    options = {
        **TRAINER_DEFAULTS,
        **recipe,
        "devices": 1,
        "precision": trainer_precision(str(given.get("accelerator", "auto"))),
        "enable_checkpointing": any(isinstance(one, Checkpoint) for one in callbacks),
        "plugins": [SafeCheckpointIO()],
        **given,
        "default_root_dir": run,
        "logger": [RunLogger(run), *(loggers if isinstance(loggers, list) else [loggers])],
        "callbacks": [one for one in everyone if is_kept or one in callbacks or not isinstance(one, ExportStudent)],
    }
    trainer = Trainer(**options)
    wait_for_rollouts(trainer.strategy)
    return trainer


def _written(
    text: str, kind: str, distiller: Distiller, seed: int, val: Rows | None, root: Path, accelerator: str
) -> dict[str, Any]:
    """Rows that the teacher's model writes about a context, and the context; None where each row has its own part."""
    out = root / f"queries-{sha256(text.encode()).hexdigest()[:8]}"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "context.txt"
        file.write_text(text, encoding="utf-8")
        words = ["--context", str(file), "--out", str(out), "--kind", kind, "--seed", str(seed)]
        words += [] if val is None else ["--val", "0"]
        words += ["--device", "cpu"] if accelerator == "cpu" else []
        options = asking.make_parser().parse_args(words)
        options.model, writer = distiller.student_config, distiller.teacher.config
        if writer is not None:
            options.model, options.student = writer, distiller.student_config
        made = asking.make(options)
    asking.print_counts(made)
    whole = (out / asking.CONTEXT).is_file()
    return {"train": made.train, "val": val or made.val or None, "context": [text] if whole else None}


def _seed(seed: int) -> None:
    """Seed what Lightning's seed_everything does, without its variables in the environment."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _result(trainer: Trainer, distiller: Distiller, data: ContextQueryDataModule, folder: Path | None) -> Result:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    rows: dict[str, Any] = {name: getattr(data.sources[name], "rows", data.sources[name]) for name in ("train", "val")}
    return Result(
        student=distiller.student.model.eval(),
        tokenizer=distiller.student.tokenizer,
        measured=[one for each in callbacks if isinstance(each, RecoveryAndDrift) for one in each.measured],
        samples=[row for each in callbacks if isinstance(each, AnswerSamples) for row in each.rows],
        **rows,
        folder=folder,
        _facts=facts_of(trainer, distiller),
        _dtype=own_dtype(distiller),
        _views=data.views,
        _sampling=distiller.eval_sampling,
    )
