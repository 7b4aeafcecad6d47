"""Files of a folder that somebody else made: JSON objects, and which weights there are."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from opcd.runtime.errors import UserError

LONGEST = 64 * 2**20
"""Bytes of a JSON file; the largest index of weights has about a tenth."""
DEEPEST = 64
"""Most levels of such a file."""


def read_object(file: Path, key: str) -> dict[str, Any]:
    """The JSON object of a file.

    Raises:
        UserError: it is no regular file, too large, or holds anything else.
    """
    where = f"{key}.name: {file}"
    if not file.is_file():
        raise UserError(f"{where} is no file")
    try:
        if file.stat().st_size > LONGEST:
            raise UserError(f"{where} has {file.stat().st_size} bytes, and no such file has more than {LONGEST}")
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold an object, not {kind(value)}")
    if any(depth > DEEPEST for depth, _, _ in values_in(value)):
        raise UserError(f"{where} is nested too deeply")
    return value


def values_in(value: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(depth, field, value) of everything in an object: an object or a list itself, then what is in it."""
    rest: list[tuple[int, str, Any]] = [(0, "", value)]
    while rest:
        depth, field, inner = rest.pop()
        yield depth, field, inner
        if isinstance(inner, dict):
            above = f"{field}." if field else ""
            rest.extend((depth + 1, f"{above}{name}"[-200:], each) for name, each in inner.items())
        if isinstance(inner, list):
            rest.extend((depth + 1, field, each) for each in inner)


def kind(value: object) -> str:
    """What JSON calls a value."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def shapes(file: Path, key: str) -> dict[str, list[int]]:
    """The tensors of a .safetensors file by name; no tensor is read.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        raise UserError(f"{key}.name: {file} is no file")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{key}.name: cannot load {file}: {error}") from error
