"""A JSONL file that grows by complete batches and survives kill -9."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import append_lines, explained, open_own

Record = dict[str, Any]


class Journal:
    """The records of a file, those of earlier runs first.

    Each record holds `batch`: [its place in the batch, the size of the batch]. An incomplete batch of a killed run, and
    a truncated last line, are cut off when the file is opened: the same batch is then computed again, with the same
    draws.

    Args:
        path: the file; made by the first `append`.
        keep: fields of a record that stay in memory; None: all.

    Attributes:
        records: the kept fields of each record.

    Raises:
        UserError: a line other than the last is not a record: somebody has changed the file.
    """

    def __init__(self, path: Path, keep: Sequence[str] | None = None) -> None:
        self.path, self.keep = path, keep
        self.records: list[Record] = []
        if path.exists():
            self._read()

    def append(self, records: Sequence[Record]) -> None:
        """Add a batch, and wait until it is on the disk."""
        batch = [{**record, "batch": [place, len(records)]} for place, record in enumerate(records)]
        append_lines(
            self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in batch), lasting=True
        )
        self.records += map(self._kept, batch)

    def _kept(self, record: Record) -> Record:
        return record if self.keep is None else {name: record[name] for name in self.keep}

    def _read(self) -> None:
        whole, read = 0, 0
        found: list[Record] = []
        with explained(self.path), os.fdopen(open_own(self.path, os.O_RDWR), "r+b") as stream:
            for number, line in enumerate(stream, start=1):
                if not line.endswith(b"\n"):
                    break
                record, (place, size) = self._parsed(line, number)
                found.append(record)
                read += len(line)
                if place + 1 == size:
                    self.records += found
                    whole, found = read, []
            stream.truncate(whole)

    def _parsed(self, line: bytes, number: int) -> tuple[Record, tuple[int, int]]:
        try:
            record = json.loads(line)
            place, size = record["batch"]
            return self._kept(record), (place, size)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.path}:{number}: not a record of this run; delete the file to compute it again"
            ) from error
