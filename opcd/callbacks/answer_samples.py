"""The student's answers as JSONL: to a few fixed queries around training, and to all rows of `opcd predict`."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opcd.callbacks.log_folder import append_rows, run_folder
from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Distiller
from opcd.runtime.errors import UserError
from opcd.runtime.output import Screen, plain
from opcd.tasks.matching import right

FIELDS = ("step", "query", "reference", "context", "answer")


class AnswerSamples(Callback):
    """Logs the student's answers to the first validation queries, or training queries if there is no validation data.

    Every answer is a line of `samples.jsonl` in the run's folder: step, query, reference, context (whether the prompt
    contained the context), answer. A table of before and after is printed at the end. An answer counts as right if it
    contains the reference as separate words or numbers, in any case (`opcd.tasks.matching`). Queries without a
    reference are shown but not counted.

    Args:
        queries: number of queries.
        every_n_steps: optimizer steps between two rounds of answers; null: before and after training only.
    """

    def __init__(self, queries: int = 6, every_n_steps: int | None = None) -> None:
        if queries < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"AnswerSamples needs queries >= 1 and every_n_steps >= 1 or null, got {queries}, {every_n_steps}"
            )
        self.queries, self.every_n_steps = queries, every_n_steps
        self.rows: list[dict[str, Any]] = []
        self._former: list[dict[str, Any]] = []
        self._batch: Batch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the file to write."""
        self._file = run_folder(trainer) / "samples.jsonl"

    def state_dict(self) -> dict[str, Any]:
        """The answers so far: a resumed run no longer has the student that training began with."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the earlier answers for `on_fit_start`."""
        self._former = [{name: row[name] for name in FIELDS} for row in state_dict["rows"]]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the queries; keep the answers of the run that is resumed if they are to the same queries."""
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, ContextQueryDataModule):
            raise UserError(
                "AnswerSamples needs a ContextQueryDataModule: remove the callback, or pass one to the trainer"
            )
        split = "val" if datamodule.sources["val"] else "train"
        examples = datamodule.examples(split)[: self.queries]
        self._batch = datamodule.encode(examples)
        asked = [query_text(example.query) for example in examples]
        first = [row["query"] for row in self._former if row["step"] == 0 and not row["context"]]
        self.rows = self._former if first == asked else []
        self._write(trainer, self.rows)
        rank_zero_info(f"answers to the first {len(examples)} queries of data.{split} go to samples.jsonl")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask without and with the context; a resumed run asks only if its checkpoint's step was due and not asked."""
        if not self.rows:
            self._ask(trainer, pl_module, context=False)
            self._ask(trainer, pl_module, context=True)
        else:
            self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Ask without the context every n steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask without the context, unless this step has been asked."""
        if self.rows and self.rows[-1]["step"] != trainer.global_step:
            self._ask(trainer, pl_module, context=False)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table after the export; a resumed run that had no step left asks here."""
        self.on_train_end(trainer, pl_module)
        if self.rows and trainer.is_global_zero:
            print_table(self.rows, Screen(width=None if Screen().is_terminal else 140))

    def _ask(self, trainer: Trainer, pl_module: LightningModule, context: bool) -> None:
        assert isinstance(pl_module, Distiller) and self._batch is not None
        batch = self._batch
        with torch.random.fork_rng(devices=[pl_module.device] if pl_module.device.type == "cuda" else []):
            answers = pl_module.answers(batch, context, "sample answers")
        for example, answer in zip(batch.examples, answers, strict=True):
            row = {"step": trainer.global_step, "query": query_text(example.query), "reference": example.reference}
            self.rows.append({**row, "context": context, "answer": answer})
        self._write(trainer, self.rows[-len(answers) :])

    def _write(self, trainer: Trainer, rows: list[dict[str, Any]]) -> None:
        if rows and trainer.is_global_zero:
            append_rows(self._file, rows)


class PredictionWriter(BasePredictionWriter):
    """Appends every batch to `predictions.jsonl` in the run's folder; other ranks write `predictions-1.jsonl`, ...

    Each line is one query: source, query, reference, answer (without the context) and answer_with_context, which is
    null if there is no context.
    """

    def __init__(self) -> None:
        super().__init__("batch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the file to write."""
        rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
        self._file = run_folder(trainer) / f"predictions{rank}.jsonl"

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write the rows of one batch."""
        append_rows(self._file, prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the answers are."""
        rank_zero_info(f"answers written to {self._file}")


def query_text(query: str | list[dict[str, str]]) -> str:
    """The query as one string, with one line for each message of a chat."""
    return query if isinstance(query, str) else "\n".join(message["content"] for message in query)


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the answers before, after and with the context side by side, with the counts of right answers."""
    first, last = (bound(row["step"] for row in rows) for bound in (min, max))
    begin = "before" if first == 0 else f"at step {first}"  # the run that is resumed had other queries
    columns = {
        f"without context, {begin}": [row for row in rows if row["step"] == first and not row["context"]],
        f"without context, after {last} steps": [row for row in rows if row["step"] == last and not row["context"]],
        f"with context, {begin}": [row for row in rows if row["context"]],
    }
    table = Table(show_lines=True)
    table.add_column("question")
    for title, answers in columns.items():
        known = [row for row in answers if row["reference"] is not None]
        table.add_column(f"{title}: {sum(map(right, known))} of {len(known)} right" if known else title)
    for number, row in enumerate(columns[f"with context, {begin}"]):
        beside = [answers[number] for answers in columns.values()]
        marks = ["" if one["reference"] is None else "✓ " if right(one) else "✗ " for one in beside]
        cells = [_short(one["answer"], mark) for one, mark in zip(beside, marks, strict=True)]
        table.add_row(_short(row["query"]), *cells)
    console.print(table)


def _short(text: str, mark: str = "", limit: int = 240) -> Text:
    return plain(mark + (text if len(text) <= limit else f"{text[:limit]} … (in full in samples.jsonl)"))
