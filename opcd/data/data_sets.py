"""Several data sets as one, each with its own context and teacher."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opcd.data.contexts import read_context
from opcd.data.example import Example, OnBadRow
from opcd.data.readers import ExampleSource, read_examples
from opcd.runtime.errors import UserError


@dataclass
class DataSet:
    """Rows that share a context or a teacher."""

    rows: str
    """A .jsonl, .json, .csv or .parquet file, a pattern of several, or a hub data set (org/name:split or
    org/name/config:split)."""
    context: str | None = None
    """File with one context, for rows without their own; null: data.context."""
    teacher: str | None = None
    """Name of the teacher, for rows that name none; null: the default of model.teacher."""


class DataSets(ExampleSource):
    """The rows of several data sets, one set after the other; training shuffles them together.

    Args:
        data_sets: at least one.
    """

    def __init__(self, data_sets: list[DataSet]) -> None:
        if not data_sets:
            raise ValueError("DataSets needs at least one data set in data_sets: {rows, context, teacher}")
        self.data_sets = data_sets

    def __str__(self) -> str:
        return ", ".join(data_set.rows for data_set in self.data_sets)

    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """All rows, numbered consecutively: the number decides which context is drawn."""
        found: list[Example] = []
        for number, data_set in enumerate(self.data_sets):
            found += _examples(data_set, f"{key}.init_args.data_sets[{number}]", on_bad_row)
        return [replace(example, index=index) for index, example in enumerate(found)]

    def overlap(self, other: ExampleSource) -> str | None:
        """None: the rows of files are unknown before they are read."""
        return None


def _examples(data_set: DataSet, key: str, on_bad_row: OnBadRow) -> list[Example]:
    """The rows of one data set, with its context and teacher if they have none."""
    examples = read_examples(data_set.rows, f"{key}.rows", on_bad_row)
    for name in ("context", "teacher"):
        if getattr(data_set, name) is not None and all(getattr(example, name) is not None for example in examples):
            raise UserError(f"{key}.{name} has no effect: every row has a {name} of its own; remove one of the two")
    context = None if data_set.context is None else read_context(data_set.context, f"{key}.context")
    return [replace(e, context=e.context or context, teacher=e.teacher or data_set.teacher) for e in examples]
