"""Answers to a few fixed queries: before training, every n steps, and at the end."""

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from rich.text import Text

from opcd.callbacks.log_folder import run_folder, still_there
from opcd.data import Batch, ContextQueryDataModule
from opcd.modules import Distiller
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import append_lines
from opcd.runtime.output import Screen, plain
from opcd.tasks.matching import right

FIELDS = ("step", "query", "reference", "context", "answer")


class AnswerSamples(Callback):
    """Logs the student's answers to the first validation queries (training queries where there are none).

    Every answer is a line of `samples.jsonl` in the run's folder: step, query, reference, context (whether the prompt
    held it), answer. A table of before and after is printed at the end. An answer is called right where it contains
    the reference as words or numbers of their own, in any case (`opcd.tasks.matching`); queries without a
    reference are shown and not counted.

    Args:
        queries: how many queries.
        every_n_steps: optimizer steps between two rounds; null asks before and after training only.
    """

    def __init__(self, queries: int = 6, every_n_steps: int | None = None) -> None:
        if queries < 1 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(
                f"AnswerSamples wants queries >= 1 and every_n_steps >= 1 or null, got {queries}, {every_n_steps}"
            )
        self.queries, self.every_n_steps = queries, every_n_steps
        self.rows: list[dict[str, Any]] = []
        self._former: list[dict[str, Any]] = []
        self._batch: Batch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where to write."""
        self._file = run_folder(trainer) / "samples.jsonl"

    def state_dict(self) -> dict[str, Any]:
        """What was answered so far: a run that goes on began with a student that is no longer there."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep it for `on_fit_start`."""
        self._former = [{name: row[name] for name in FIELDS} for row in state_dict["rows"]]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose the queries; take up what the run that this one goes on from was answered to the same."""
        datamodule = getattr(trainer, "datamodule", None)
        if not isinstance(datamodule, ContextQueryDataModule):
            raise UserError(
                "AnswerSamples needs a ContextQueryDataModule: remove the callback or pass one to the trainer"
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
        """Ask without and with the context; a run that goes on, only what the one before was kept from asking."""
        if not self.rows:
            self._ask(trainer, pl_module, context=False)
            self._ask(trainer, pl_module, context=True)
        else:
            self._ask_where_due(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Ask without the context every n steps."""
        self._ask_where_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask without the context once more."""
        self._ask_last(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table, when the student is on the disk; ask where a run that went on had no step left."""
        self._ask_last(trainer, pl_module)
        if self.rows and trainer.is_global_zero:
            print_table(self.rows, Screen(width=None if Screen().is_terminal else 140))

    def _ask_last(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.rows and self.rows[-1]["step"] != trainer.global_step:
            self._ask(trainer, pl_module, context=False)

    def _ask_where_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if self.every_n_steps and step % self.every_n_steps == 0 and self.rows[-1]["step"] != step:
            self._ask(trainer, pl_module, context=False)

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
            still_there(self._file.parent)
            append_lines(self._file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def query_text(query: str | list[dict[str, str]]) -> str:
    """The query as one string: a chat's messages, a line each."""
    return query if isinstance(query, str) else "\n".join(message["content"] for message in query)


def print_table(rows: list[dict[str, Any]], console: Console) -> None:
    """Before, after and with the context, side by side, with the counts of right answers."""
    first, last = (bound(row["step"] for row in rows) for bound in (min, max))
    begin = "before" if first == 0 else f"at step {first}"  # of other queries than a run was begun with
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
        table.add_row(_short(row["query"]), *(_marked(answers[number]) for answers in columns.values()))
    console.print(table)


def _marked(row: dict[str, Any]) -> Text:
    mark = "" if row["reference"] is None else "✓ " if right(row) else "✗ "
    return _short(row["answer"], mark)


def _short(text: str, mark: str = "", limit: int = 240) -> Text:
    return plain(mark + (text if len(text) <= limit else f"{text[:limit]} … (whole in samples.jsonl)"))
