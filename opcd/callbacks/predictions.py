"""The answers of `opcd predict` as JSONL."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_info

from opcd.callbacks.log_folder import append_rows, run_folder


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
