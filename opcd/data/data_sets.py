"""Several data sets as one, each with a context and a teacher of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opcd.data.contexts import read_contexts
from opcd.data.example import Example, OnBadRow
from opcd.data.readers import ExampleSource, read_examples
from opcd.runtime.errors import UserError


@dataclass
class DataSet:
    """Rows that have a context or a teacher in common."""

    rows: str
    """A .jsonl, .json, .csv or .parquet file, a pattern of several, or a hub data set (org/name:split or
    org/name/config:split)."""
    context: str | None = None
    """File with the one context of its rows without their own; null leaves them data.context."""
    teacher: str | None = None
    """Name of the teacher of its rows that name none; null leaves them the default of model.teacher."""


class DataSets(ExampleSource):
    """The rows of several data sets, one set after the other; training shuffles them together.

    Args:
        data_sets: at least one.
    """

    def __init__(self, data_sets: list[DataSet]) -> None:
        if not data_sets:
            raise ValueError("DataSets wants at least one data set in data_sets: {rows, context, teacher}")
        self.data_sets = data_sets

    def __str__(self) -> str:
        return ", ".join(data_set.rows for data_set in self.data_sets)

    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """All rows, numbered through: their contexts are drawn by the number."""
        found: list[Example] = []
        for number, data_set in enumerate(self.data_sets):
            found += _examples(data_set, f"{key}.init_args.data_sets[{number}]", on_bad_row)
        return [replace(example, index=index) for index, example in enumerate(found)]

    def overlap(self, other: ExampleSource) -> str | None:
        """Unknown before the files are read, as of any file."""
        return None


def _examples(data_set: DataSet, key: str, on_bad_row: OnBadRow) -> list[Example]:
    """The rows of one data set, with its context and teacher where they have none."""
    examples = read_examples(data_set.rows, f"{key}.rows", on_bad_row)
    for name in ("context", "teacher"):
        if getattr(data_set, name) is not None and all(getattr(example, name) is not None for example in examples):
            raise UserError(f"{key}.{name} has no effect: every row has a {name} of its own; remove one of the two")
    context = None if data_set.context is None else _one_context(data_set.context, f"{key}.context")
    return [replace(e, context=e.context or context, teacher=e.teacher or data_set.teacher) for e in examples]


def _one_context(file: str, key: str) -> str:
    contexts = read_contexts(file, key)
    if len(contexts) > 1:
        raise UserError(f"{key}: {file} holds {len(contexts)} contexts, and a data set has one; data.context draws")
    return contexts[0]
