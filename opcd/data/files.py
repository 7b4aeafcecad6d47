"""Files of the user's, read with messages that say which file, which line and which config key; and files of ours."""

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from opcd.errors import UserError


def require_file(source: str, key: str) -> Path:
    """The path of a file that exists.

    Raises:
        UserError: it does not exist (with the path tried, and a similar name in its folder), or is a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{key}: {path.resolve()} is a folder; name a file in it")
    if not path.exists():
        folder = path.resolve().parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key}: no file {path.resolve()}{hint}")
    return path


def read_bytes(path: Path, key: str) -> bytes:
    """The content of a file.

    Raises:
        UserError: the system refuses to read it.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{key}: cannot read {path.resolve()}: {error.strerror}") from error


def read_text(path: Path, key: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: it is not UTF-8 (with the line).
    """
    try:
        return read_bytes(path, key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from error


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """(source, value) of each line that is not blank; source is "file:line".

    Raises:
        UserError: a line is not valid JSON.
    """
    for number, line in enumerate(read_text(path, key).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        yield f"{path}:{number}", value


def read_json(path: Path, key: str) -> object:
    """The value of a JSON file.

    Raises:
        UserError: it is not valid JSON (with the line).
    """
    try:
        value: object = json.loads(read_text(path, key))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg}") from error
    return value


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is whole or not there, also after a crash of the machine."""
    scratch = path.with_name(f".{path.name}-being-written")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    scratch.replace(path)
