"""Readers of examples: files (.jsonl, .json, .csv, .parquet), data sets of the hub, rows that are Python objects."""

from __future__ import annotations

import csv
import glob
import io
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opcd.data.example import ACCEPTED, Example, OnBadRow, parse_rows
from opcd.models.hub_access import hub_reachable
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import LONGEST, jsonl_lines, raising, read_json, read_text, require_file, suffix_of

Rows = Iterator[tuple[str, object]]

HUB_ID = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(/(?P<config>[\w.-]+))?(:(?P<split>.+))?")
KINDS = ".jsonl, .json, .csv or .parquet"
SAVED = ("dataset_info.json", "dataset_dict.json")
"""Files that `save_to_disk` of the library `datasets` writes into its folder."""
STAGES = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""The splits that a stage of the Trainer reads; the first is required."""


class ExampleSource(ABC):
    """A source of examples that are in no file. Its `str` names them in messages and in the model card."""

    @abstractmethod
    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """The examples, at least one; arguments as for `read_examples`."""

    @abstractmethod
    def overlap(self, other: ExampleSource) -> str | None:
        """What both sources contain, in words for a message; None if they share nothing."""


class InMemory(ExampleSource):
    """Rows that are Python objects.

    Args:
        rows: any iterable of rows, such as a list or a `datasets.Dataset`; a text is a row with that query.
        key: the config key of the rows, for messages.

    Raises:
        UserError: `rows` is one row, a dictionary of splits or a table of pandas.
    """

    def __init__(self, rows: Iterable[Any], key: str) -> None:
        if isinstance(rows, Mapping):
            names = ", ".join(map(str, rows))
            raise UserError(f"{key}: a dictionary ({names}); give a list of rows, or one split of a DatasetDict")
        if hasattr(rows, "iterrows"):  # to iterate over it gives the names of its columns
            raise UserError(f'{key}: a table of pandas; give its rows: table.to_dict("records")')
        if not isinstance(rows, Iterable):
            raise UserError(f"{key}: {type(rows).__name__} is no source of rows; give a file, or a list of rows")
        self.rows = [{"query": row} if isinstance(row, str) else row for row in rows]

    def __str__(self) -> str:
        return f"{len(self.rows)} rows in memory"

    def examples(self, key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
        """The rows; their sources are "data.train: row 1" and so on."""
        found = parse_rows(_numbered(self.rows, key), key, on_bad_row)
        if not found:
            raise UserError(f"{key}: no rows")
        return found

    def overlap(self, other: ExampleSource) -> str | None:
        """None: rows are not compared, as those of files are not."""
        return None


def as_source(given: str | Path | ExampleSource | Iterable[Any] | None, key: str) -> str | ExampleSource | None:
    """The source that a caller gives: a name of files or of the hub, an ExampleSource, or the rows themselves."""
    if given is None or isinstance(given, str | ExampleSource):
        return given
    return str(given) if isinstance(given, Path) else InMemory(given, key)


def read_examples(
    source: str | ExampleSource,
    key: str = "data.train",
    on_bad_row: OnBadRow = "raise",
    accepted: str = ACCEPTED,
) -> list[Example]:
    """All examples of a source.

    Args:
        source: a .jsonl, .json, .csv or .parquet file (also .gz, except Parquet), a pattern of several
            (rows/*.jsonl), a hub data set "org/name", "org/name:split" or "org/name/config:split" (default split:
            train; slices of `datasets`, such as train[:1000], are allowed; a set with several configs needs one), or an
            ExampleSource.
        key: the config key of the source, for messages and for the `source` of examples that are in no file.
        on_bad_row: raise an error for the first malformed row, or skip all such rows with one warning.
        accepted: the accepted shapes of rows, for messages.

    Raises:
        UserError: the source cannot be read, has no rows, or a row is wrong.
    """
    if isinstance(source, ExampleSource):
        return source.examples(key, on_bad_row)
    examples = parse_rows(_rows(source, key), key, on_bad_row, accepted)
    if not examples:
        raise UserError(f"{key}: {source} has no rows")
    return examples


def read_rows(source: str, key: str) -> Rows:
    """(where, raw row) of each row of a source, such as ("train.jsonl:12", {...}); arguments as for `read_examples`.

    Raises:
        UserError: the source cannot be read, or a line is not JSON.
    """
    return raising(_rows(source, key))


def _rows(source: str, key: str) -> Rows:
    """The rows as in `read_rows`, but a line that is not JSON gives its UserError as the row."""
    path, file = Path(source).expanduser(), find_file(source, key)
    if file is not None:
        return _file_rows([file], key)
    hub = HUB_ID.fullmatch(source)
    if hub is None and glob.has_magic(source) and not path.exists():
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  absolute too
        if not files:
            raise UserError(f"{key}: no file matches {path.absolute()}")
        return _file_rows(files, key)
    if hub is None or path.exists():
        raise UserError(
            f"{key}: {source!r} is neither a {KINDS} file nor a hub data set (org/name:split, or org/name/config:split)"
        )
    return _hub_rows(hub["name"], hub["config"], hub["split"] or "train", key)


def find_file(source: str, key: str) -> Path | None:
    """The file that a source names; None for a pattern or a hub data set.

    Raises:
        UserError: the file does not exist, or is a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir() and any((path / name).is_file() for name in SAVED):
        raise UserError(
            f"{key}: {path.resolve()} was written by save_to_disk of `datasets`; write it as one file: "
            f"datasets.load_from_disk({str(path)!r}).to_parquet('rows.parquet') (of a dictionary of splits, one by one)"
        )
    if path.is_dir():
        raise UserError(
            f"{key}: {path.resolve()} is a folder; name a file in it, or several by a pattern ({path}/*.jsonl)"
        )
    pattern = glob.has_magic(source) and not path.exists()
    return None if pattern or _reader(path) is None else require_file(source, key)


def _file_rows(files: list[Path], key: str) -> Rows:
    """Yield the rows of files, one after the other. All names are checked before the first file is read."""
    readers = []
    for file in files:
        if (reader := _reader(file)) is None or file.is_dir():
            raise UserError(f"{key}: {file.resolve()} is not a {KINDS} file; narrow the pattern")
        readers.append(reader)
    for file, reader in zip(files, readers, strict=True):
        yield from reader(file, key)


def _reader(path: Path) -> Callable[[Path, str], Rows] | None:
    """The reader for a file name's suffix; None for an unknown suffix."""
    if path.suffix == ".parquet":
        return _parquet_rows
    return {".jsonl": jsonl_lines, ".json": _json_rows, ".csv": _csv_rows}.get(suffix_of(path))


def _csv_rows(path: Path, key: str) -> Rows:
    """Rows of text cells below a line of names; an empty cell is None."""
    csv.field_size_limit(LONGEST)
    lines = csv.reader(io.StringIO(read_text(path, key), newline=""), strict=True)
    try:
        names = next(lines, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{path}:1: two columns are called {twice[0]!r}; rename one")
        for cells in lines:
            where, row = f"{path}:{lines.line_num}", dict(zip(names, (cell or None for cell in cells), strict=False))
            if not any(cells):
                continue
            wrong = f"{where}: {len(cells)} cells under {len(names)} names; quote a cell that holds a comma"
            yield where, row if len(cells) == len(names) else UserError(wrong)
    except csv.Error as error:
        raise UserError(f"{path}:{lines.line_num}: not valid CSV: {error}") from error


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


def _hub_rows(name: str, config: str | None, split: str, key: str) -> Rows:
    import datasets
    from lightning.pytorch.utilities import rank_zero_info  # takes seconds

    source = f"{name}/{config}:{split}" if config else f"{name}:{split}"
    if not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # read the cache only, without 20 s of retries
    rank_zero_info(f"{key}: reading {source}, from the hub or its cache")
    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(f"{key}: no hub data set {name}, and no such file ({Path(name).resolve()}): {error}") from error
    except (ConnectionError, OSError) as error:
        raise UserError(
            f"{key}: the hub could not be reached for {source}: {error}; "
            f"check the network, or give a {KINDS} file ({Path(name).resolve()} does not exist)"
        ) from error
    except (ValueError, datasets.exceptions.DatasetsError) as error:
        named = "config" in str(error).lower()
        hint = f"; name a config as {name}/CONFIG:{split}" if named else ""
        raise UserError(f"{key}: the hub data set {source} cannot be read: {error}{hint}") from error
    yield from _numbered(rows, source)


def _numbered(rows: Iterable[object], source: str) -> Rows:
    """Yield the rows of a source without lines, numbered from 1."""
    for number, row in enumerate(rows, start=1):
        yield f"{source}: row {number}", row


def not_set(stage: str) -> str:
    """The message where a stage's first split is not set."""
    name = str.__str__(stage)  # Lightning's enumeration formats differently
    return (
        f"data.{STAGES[stage][0]} is not set; `{name}` needs it: name a file or a hub data set (`opcd queries "
        "--context FILE --out FOLDER` writes questions about a context, `opcd init FOLDER` a recipe to begin with)"
    )
