"""A folder that belongs to one run of a command: the same command resumes it, another one is refused."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import require_own, write_atomic
from opcd.runtime.files.user_files import read_json

IDENTITY = "run.json"


def claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Claim the folder for a run, or resume the same run.

    Args:
        folder: the folder; made where it is not there.
        identity: the settings that the files of the run depend on.

    Raises:
        UserError: the folder holds a run of another config (names the keys that differ), or other files.
    """
    new = json.loads(json.dumps(identity))
    file = folder / IDENTITY
    if not file.exists():
        require_own(folder, "out", (".lock",))
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps(new, indent=1, ensure_ascii=False) + "\n")
        return
    if changed := changed_keys(read_json(file, "out"), new):
        shown = ", ".join(changed[:5]) + ", ..." * (len(changed) > 5)
        raise UserError(
            f"out: {folder.resolve()} holds a run that differs in {shown}; choose another --out, or delete the folder"
        )


def write_records(file: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write JSONL atomically."""
    write_atomic(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
