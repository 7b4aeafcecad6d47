"""A data source in one file: rows of a CSV file.

    opcd fit --config configs/quickstart.yaml \\
        --data.train '{class_path: examples.data_source.Csv, init_args: {file: QUESTIONS.csv, query: question}}'
"""

import csv
from pathlib import Path

from opcd.data import Example, ExampleSource, OnBadRow, parse_rows
from opcd.runtime.errors import UserError


class Csv(ExampleSource):
    """A CSV file whose first line names its columns.

    Args:
        file: the file, in UTF-8.
        query: the column with the query.
        reference: the column that an answer is compared with; null: there is none.
    """

    def __init__(self, file: str, query: str = "query", reference: str | None = None) -> None:
        self.file = Path(file)
        self.columns = {"query": query} | ({} if reference is None else {"reference": reference})

    def __str__(self) -> str:
        return str(self.file)

    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """The rows. UserError for a file or a column that is not there, for a wrong row, and for none."""
        if not self.file.is_file():
            raise UserError(f"{key}: no file {self.file.absolute()}")
        with self.file.open(encoding="utf-8", newline="") as lines:
            reader = csv.DictReader(lines)
            for column in self.columns.values():
                if column not in (reader.fieldnames or []):
                    raise UserError(f"{key}: {self.file} has no column {column!r}; it has {reader.fieldnames}")
            fields = [
                (f"{self.file}:{reader.line_num}", {field: row[column] for field, column in self.columns.items()})
                for row in reader
            ]
        if not (examples := parse_rows(fields, key, on_bad_row)):
            raise UserError(f"{key}: {self.file} has no rows")
        return examples

    def overlap(self, other: ExampleSource) -> str | None:
        """The file, where both read the same."""
        same = isinstance(other, Csv) and self.file.resolve() == other.file.resolve()
        return f"the file {self.file}" if same else None
