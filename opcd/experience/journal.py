"""A JSONL file that grows by whole batches and survives kill -9."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd.errors import UserError

Record = dict[str, Any]


class Journal:
    """Records of a file, those of former runs first.

    Each record holds `batch`: [its place, how many were appended with it]. What a killed run left of a batch, a torn
    last line included, is cut off when the file is opened: a batch is there as a whole or not at all, so that what is
    computed again is the same batch with the same draws.

    Args:
        path: the file; made by the first `append`.

    Raises:
        UserError: a line that is not the last is no record: somebody has changed the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[Record] = []
        if path.exists():
            self._read()

    def append(self, records: Sequence[Record]) -> None:
        """Add a batch, and wait until the disk has it."""
        batch = [{**record, "batch": [place, len(records)]} for place, record in enumerate(records)]
        with self.path.open("ab") as stream:
            stream.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in batch).encode())
            stream.flush()
            os.fsync(stream.fileno())
        self.records += batch

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole, read = 0, 0
        found: list[Record] = []
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                place, size = record["batch"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{self.path}:{number}: no record of this run; delete the file to compute it anew"
                ) from error
            found.append(record)
            read += len(line)
            if place + 1 == size:
                whole, self.records = read, [*self.records, *found]
                found = []
        if whole < len(content):
            with self.path.open("r+b") as stream:
                stream.truncate(whole)
