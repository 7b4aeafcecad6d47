"""Anchors: general prompts among the training rows, which hold the student's other answers where they were."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, floor
from pathlib import Path
from typing import Any

from torch.utils.data import DistributedSampler

from opcd.data.example import ANCHORS, Example, OnBadRow
from opcd.data.readers import read_examples
from opcd.runtime.errors import UserError

PROMPTS = Path(__file__).with_name("anchor_prompts.jsonl")


@dataclass
class Anchors:
    """General prompts among the training rows. No one sees a context there, and the teacher is the student as it was
    before training: what the student says to other prompts stays what it was."""

    share: float
    """Their share of the training rows, 0 < share < 1. `batch_size` counts them too."""
    source: str | None = None
    """A file, a pattern of files or a hub data set, as for `train`, whose rows have no context; null: 128 short
    prompts that come with the package."""

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"data.anchors.share must lie strictly between 0 and 1, got {self.share}")

    @property
    def per_row(self) -> Fraction:
        """Anchors for each row with a context. Exact: 0.1 is a tenth."""
        share = Fraction(str(self.share))
        return share / (1 - share)

    def rows_beside(self, batch_size: int) -> int:
        """The most rows with a context in a batch that also holds the anchors that are due.

        Raises:
            UserError: there is no such row.
        """
        rows = batch_size
        while rows + ceil(rows * self.per_row) > batch_size:
            rows -= 1
        if rows < 1:
            raise UserError(
                f"data.anchors.share: {self.share} leaves a batch of {batch_size} no row with the context; lower it, "
                "or raise data.batch_size"
            )
        return rows

    def read(self, on_bad_row: OnBadRow) -> list[Example]:
        """The anchors. UserError if the source cannot be read, or a row has a context or names a teacher."""
        examples = read_examples(self.source or str(PROMPTS), "data.anchors.source", on_bad_row)
        for example in examples:
            for name in ("context", "teacher"):
                if getattr(example, name) is not None:
                    raise UserError(f"{example.source}: an anchor has no {name} (data.anchors); remove the column")
        return [replace(example, teacher=ANCHORS) for example in examples]


class AnchoredSampler(DistributedSampler[Example]):
    """Batches of a rank: the training rows as without anchors, and after each batch's rows the anchors that are due.

    After x training rows of a rank, in all epochs, it has had floor(x share / (1 - share)) anchors. The order depends
    on seed, epoch and rank only. An epoch is a pass over the training rows; the anchors go on where the last one ended.

    Args:
        dataset: the training rows. Indices from its length on are those of the anchors.
        anchors: their share.
        count: how many anchors there are.
        batch_size: the most rows of a batch.
        options: those of a DistributedSampler.

    Attributes:
        start: the batches to leave out of the first epoch, because they were trained on.
    """

    start = 0

    def __init__(self, dataset: Any, anchors: Anchors, count: int, batch_size: int, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._rows, self._per_row = anchors.rows_beside(batch_size), anchors.per_row
        self._first, self._count = len(dataset), count

    def __len__(self) -> int:
        return ceil(self.num_samples / self._rows)

    def __iter__(self) -> Iterator[Any]:
        """Lists of indices. The length stays that of a full epoch, which Lightning counts by."""
        start, self.start = self.start, 0
        order = list(super().__iter__())
        for first in range(start * self._rows, len(order), self._rows):
            rows = order[first : first + self._rows]
            seen = self.epoch * len(order) + first
            due = range(floor(seen * self._per_row), floor((seen + len(rows)) * self._per_row))
            yield [*rows, *map(self._anchor, due)]

    def _anchor(self, number: int) -> int:
        """The index of this rank's anchor with this number: all ranks together pass over all anchors."""
        passes, place = divmod(number * self.num_replicas + self.rank, self._count)
        order = list(range(self._count))
        if self.shuffle:
            random.Random(f"{self.seed}/anchors/{passes}").shuffle(order)
        return self._first + order[place]


@dataclass
class Listed:
    """Rows that a loader without a batch size takes a list at a time."""

    rows: list[Example]

    def __getitem__(self, indices: list[int]) -> list[Example]:
        return [self.rows[index] for index in indices]
