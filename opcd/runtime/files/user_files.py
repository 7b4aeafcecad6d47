"""Files of the user, read with error messages that name the file, the line and the config key."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from opcd.runtime.did_you_mean import beside
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import elsewhere

LONGEST = 5_000_000
"""Most characters of a text: about a million tokens."""


def require_file(source: str, key: str) -> Path:
    """The path of an existing file.

    Raises:
        UserError: the file does not exist (the message has the path and a similar name), or is a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UserError(f"{key}: {path.resolve()} is a folder; name a file in it")
    if not path.exists():
        raise UserError(f"{key}: no file {path.resolve()}{elsewhere(source)}{beside(path)}")
    return path


def refuse_existing(path: Path, key: str) -> None:
    """Raise UserError if an output that the user names exists: no command overwrites one."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(f"{key}: {path.resolve()} exists already; choose another or remove it")


def suffix_of(path: Path) -> str:
    """The suffix of a file; of a compressed one, the suffix before `.gz`."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def read_bytes(path: Path, key: str) -> bytes:
    """The content of a file, decompressed if its name ends in `.gz`.

    Raises:
        UserError: the file cannot be read, or is no complete gzip file.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{key}: {path.resolve()} is no complete gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: cannot read {path.resolve()}: {error.strerror}") from error


def read_text(path: Path, key: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Raises:
        UserError: the file is not UTF-8 (the message has the line).
    """
    try:
        return read_bytes(path, key).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not valid UTF-8 ({error.reason}); save the file as UTF-8") from error


def read_jsonl(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", value) of each line that is not blank.

    Raises:
        UserError: a line is not valid UTF-8 or JSON.
    """
    return raising(jsonl_lines(path, key))


def raising(rows: Iterable[tuple[str, object]]) -> Iterator[tuple[str, object]]:
    """Yield the rows; raise the first value that is an error."""
    for source, value in rows:
        if isinstance(value, UserError):
            raise value
        yield source, value


def jsonl_lines(path: Path, key: str) -> Iterator[tuple[str, object]]:
    """Yield ("file:line", value) of each line that is not blank.

    The value of a line that is not valid UTF-8 or JSON is a UserError, to raise or to count.
    """
    for number, line in enumerate(read_bytes(path, key).removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        value: object
        try:
            value = parse_json(line.decode(), f"{path}:{number}")
        except UnicodeDecodeError as error:
            value = UserError(f"{path}:{number}: not valid UTF-8 ({error.reason}); save the file as UTF-8")
        except UserError as error:
            value = error
        yield f"{path}:{number}", value


def read_json(path: Path, key: str) -> object:
    """The value of a JSON file.

    Raises:
        UserError: the file is not valid JSON (the message has the line).
    """
    return parse_json(read_text(path, key), str(path))


def parse_json(text: str, source: str) -> object:
    """The value of a JSON text. Repeated names in an object, NaN and infinities are errors.

    Raises:
        UserError: names the source and, in a text of several lines, the line.
    """
    try:
        value: object = json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        line = f":{error.lineno}" if "\n" in text else ""
        raise UserError(f"{source}{line}: not valid JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not valid JSON: {error}") from error
    return value


def check_text(text: str, where: str) -> None:
    """Check that a tokenizer can encode a text.

    Raises:
        UserError: the text has a NUL character or half of a surrogate pair, or is longer than any model's window.
    """
    if "\0" in text:
        raise UserError(f"{where} holds a NUL character, its {text.index(chr(0)) + 1}th; remove it")
    if len(text) > LONGEST:
        raise UserError(f"{where} has {len(text)} characters; more than {LONGEST} fit into no model: cut it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"{text[error.start]!a}, its {error.start + 1}th character"
        raise UserError(f"{where} holds half of a surrogate pair ({half}); remove it") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value: dict[str, object] = {}
    for name, each in pairs:
        if name in value:
            raise ValueError(f"an object has {name!r:.200} twice")
        value[name] = each
    return value


def _no_number(name: str) -> object:
    raise ValueError(f"{name} is no number")
