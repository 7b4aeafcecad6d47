"""Answers of `opcd predict` as JSONL."""

import json
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from opcd.callbacks.log_folder import run_folder, still_there
from opcd.runtime.files.disk import append_lines


class PredictionWriter(BasePredictionWriter):
    """Appends every batch to `predictions.jsonl` in the run's folder, one file a rank (`predictions-1.jsonl`, ...).

    A line a query: source, query, reference, answer (without the context) and answer_with_context, null where there is
    no context.
    """

    def __init__(self) -> None:
        super().__init__("batch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn where to write."""
        rank = f"-{trainer.global_rank}" if trainer.global_rank else ""
        self._file = run_folder(trainer) / f"predictions{rank}.jsonl"

    def write_on_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write the rows of one batch."""
        still_there(self._file.parent)
        append_lines(self._file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in prediction))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the answers are."""
        rank_zero_info(f"answers written to {self._file}")
