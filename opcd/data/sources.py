"""Examples from a file (.jsonl, .json, .parquet) or from a data set of the hub."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path

from opcd.data.examples import Example, OnBadRow, parse_rows
from opcd.data.files import jsonl_lines, raising, read_json, require_file
from opcd.errors import UserError
from opcd.hub import hub_reachable

Rows = Iterator[tuple[str, object]]

HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?")


class ExampleSource(ABC):
    """Makes examples that stand in no file. Its `str` names them in messages and in the model card."""

    @abstractmethod
    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """The examples, at least one; arguments as for `read_examples`."""

    @abstractmethod
    def overlap(self, other: ExampleSource) -> str | None:
        """What both give, in words for a message; None where they have nothing in common."""


def read_examples(
    source: str | ExampleSource, key: str = "data.train", on_bad_row: OnBadRow = "raise"
) -> list[Example]:
    """All examples of a source.

    Args:
        source: a .jsonl, .json or .parquet file, a hub data set "org/name", "org/name:split" or "org/name/config:split"
            (split: train; slices of `datasets`, such as train[:1000], are allowed; a set with several configs needs
            one), or what makes examples itself.
        key: the config key that holds the source, for messages and for the `source` of examples that stand in no file.
        on_bad_row: raise an error for the first wrong row, or leave all such rows out with one warning.

    Raises:
        UserError: the source cannot be read, has no rows, or a row is wrong.
    """
    if isinstance(source, ExampleSource):
        return source.examples(key, on_bad_row)
    examples = parse_rows(_rows(source, key), key, on_bad_row)
    if not examples:
        raise UserError(f"{key}: {source} has no rows")
    return examples


def read_rows(source: str, key: str) -> Rows:
    """(where, raw row) of each row of a source, such as ("train.jsonl:12", {...}); arguments as for `read_examples`.

    Raises:
        UserError: the source cannot be read, or a line of it is no JSON.
    """
    return raising(_rows(source, key))


def _rows(source: str, key: str) -> Rows:
    """The same; a line that is no JSON is the UserError that says so."""
    path = Path(source).expanduser()
    if is_file(source):
        return READERS.get(path.suffix, jsonl_lines)(require_file(source, key), key)
    hub = HUB_ID.fullmatch(source)
    if hub is None or path.exists():
        raise UserError(
            f"{key}: {source!r} is neither a {', '.join(READERS)} file nor a hub data set (org/name:split, or "
            "org/name/config:split)"
        )
    return _hub_rows(hub["name"], hub["config"], hub["split"] or "train", key)


def _json_rows(path: Path, key: str) -> Rows:
    value = read_json(path, key)
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise UserError(f'{key}: {path} must hold a list of rows, or {{"data": [...]}} with such a list')
    yield from _numbered(rows, str(path))


def _parquet_rows(path: Path, key: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{key}: cannot read {path} as Parquet: {error}") from error
    yield from _numbered(table.to_pylist(), str(path))


READERS = {".jsonl": jsonl_lines, ".json": _json_rows, ".parquet": _parquet_rows}
"""By the suffix of a file."""


def is_file(source: str) -> bool:
    """Whether a source is read as a file, which may not be there, and not as a hub data set."""
    path = Path(source).expanduser()
    return path.suffix in READERS or path.is_dir()


def _hub_rows(name: str, config: str | None, split: str, key: str) -> Rows:
    import datasets

    source = f"{name}/{config}:{split}" if config else f"{name}:{split}"
    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # what is in the cache is still read, and nothing is tried for 20 s
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}: no hub data set {name}, and no such file ({Path(name).resolve()}): {error}") from error
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"{key}: the hub could not be reached for {source}: {error}; "
            f"check the network, or give a .jsonl, .json or .parquet file ({Path(name).resolve()} does not exist)"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        named = "config" in str(error).lower()
        hint = f"; a config is named so: {name}/CONFIG:{split}" if named else ""
        raise UserError(f"{key}: the hub data set {source} cannot be read: {error}{hint}") from error
    yield from _numbered(rows, source)


def _numbered(rows: Iterable[object], source: str) -> Rows:
    """Rows of a source without lines: they are counted from 1."""
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row
