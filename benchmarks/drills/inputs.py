"""Drills of malformed files of rows, and of files with random changes."""

import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.drills.fits import Outcome
from opcd.data import read_examples
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import LONGEST

GOOD = '{"query": "What is 1 + 1?", "context": "A sum.", "response": "2", "reference": 2}'
FIELDS = ("query", "context", "response")


def bad_lines() -> Iterator[tuple[str, bytes, str]]:
    """(what is wrong, the line, the words of its message besides file and line)."""
    wrong = {"a number": 7, "an object": {"a": 1}, "a boolean": True, "a blank": " ", "an empty text": ""}
    for field in FIELDS:
        for name, value in {**wrong, "a list": [1], "NUL": "a\0b", "half a pair": "a\ud800b"}.items():
            yield f"{field}: {name}", json.dumps({"query": "q", field: value}).encode(), field
    yield "reference: an object", b'{"query": "q", "reference": {"a": 1}}', "reference"
    yield "too long", json.dumps({"query": "x" * (2 * LONGEST)}).encode(), "query"
    yield "no query", b'{"context": "c"}', "query"
    yield "a near name", b'{"qeury": "q"}', "query"
    yield "nothing", b"{}", "query"
    yield "null query", b'{"query": null}', "query"
    yield "a name twice", b'{"query": "a", "query": "b"}', "'query' twice"
    yield "a name twice, deeper", b'{"query": [{"role": "user", "role": "user", "content": "a"}]}', "'role' twice"
    for name, value in (("a list", "[1]"), ("a text", '"q"'), ("a number", "3"), ("null", "null"), ("true", "true")):
        yield f"a row that is {name}", value.encode(), "a row must be an object"
    for cut in (1, 9, 11, 30, len(GOOD) - 1):
        yield f"cut after {cut}", GOOD[:cut].encode(), "not valid JSON"
    for name, text in (
        ("single quotes", "{'query': 'q'}"),
        ("a comma", '{"query": "q",}'),
        ("a comment", '{"query": 1} //'),
    ):
        yield name, text.encode(), "not valid JSON"
    for name in ("NaN", "Infinity", "-Infinity"):
        yield name, f'{{"query": "q", "reference": {name}}}'.encode(), "is no number"
    yield "a raw NUL", b'{"query": "a\0b"}', "not valid JSON"
    yield "a raw tab", b'{"query": "a\tb"}', "not valid JSON"
    yield "two rows", (GOOD + GOOD).encode(), "not valid JSON"
    yield "deep", b"[" * 100_000, "not valid JSON"
    yield "a huge number", b'{"query": "q", "reference": ' + b"9" * 9999 + b"}", "not valid JSON"
    for name, data in (
        ("latin-1", b"caf\xe9"),
        ("an end cut off", b"\xe2\x82"),
        ("overlong", b"\xc0\xaf"),
        ("UTF-16", "q".encode("utf-16")),
    ):
        yield f"not UTF-8: {name}", b'{"query": "' + data + b'"}', "not valid UTF-8"
    yield "a BOM inside", b"\xef\xbb\xbf" + GOOD.encode(), "not valid JSON"
    yield from _bad_messages()


def _bad_messages() -> Iterator[tuple[str, bytes, str]]:
    user = {"role": "user", "content": "q"}
    queries = {
        "no message": [],
        "an answer last": [user, {"role": "assistant", "content": "a"}],
        "an unknown role": [{"role": "admin", "content": "q"}],
        "no role": [{"content": "q"}],
        "no content": [{"role": "user"}],
        "content of parts": [{"role": "user", "content": [{"type": "text", "text": "q"}]}],
        "another key": [{**user, "tool_calls": [1]}],
        "a text in the list": ["q"],
        "a blank": [{"role": "user", "content": " "}],
        "half a pair": [{"role": "user", "content": "\udfff"}],
    }
    for name, query in queries.items():
        yield f"messages: {name}", json.dumps({"query": query}).encode(), "query"
        yield f"prompt: {name}", json.dumps({"prompt": query}).encode(), "prompt"


def good_files() -> Iterator[tuple[str, bytes, int]]:
    """(what is unusual, the file, its number of rows) of valid files."""
    row = GOOD.encode()
    yield "a BOM", b"\xef\xbb\xbf" + row, 1
    yield "CRLF", row + b"\r\n" + row + b"\r\n", 2
    yield "blank lines", b"\n \n" + row + b"\n\n\t\n" + row, 2
    yield "U+2028 in a text", '{"query": "a\u2028b\u0085c"}'.encode(), 1
    yield "a whole pair", b'{"query": "\\ud83d\\ude00"}', 1


def inputs(runs: int, folder: Path) -> Outcome:
    """Read bad lines, which give an error with file, line and field or are counted; and unusual valid files."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome = Outcome()
    for _ in range(runs):
        for what, line, expected in bad_lines():
            outcome.add(_bad_line(folder, what, line, expected))
        for what, data, rows in good_files():
            file = folder / "good.jsonl"
            file.write_bytes(data)
            found = _read(file)
            outcome.add(None if found == rows else f"{what}: {found} instead of {rows} rows")
    return outcome


def _bad_line(folder: Path, what: str, line: bytes, expected: str) -> str | None:
    file = folder / "rows.jsonl"
    file.write_bytes(b"\n".join([GOOD.encode(), line, GOOD.encode()]))
    said = _read(file)
    if not (isinstance(said, str) and said.startswith(f"{file}:2: ") and expected in said):
        return f"{what}: {said!s:.200}"
    kept = _read(file, skip=True)
    return None if kept == (2, 1) else f"{what}: {kept} rows kept and left out with data.on_bad_row: skip"


def fuzz(runs: int, folder: Path) -> Outcome:
    """Read random files, and valid ones with random changes: no row is lost without an error or a count."""
    folder.mkdir(parents=True, exist_ok=True)
    outcome, file = Outcome(), folder / "fuzz.jsonl"

    @seed(0)
    @settings(
        max_examples=runs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.one_of(st.binary(max_size=200), _changed(), _jsons()))
    def case(data: bytes) -> None:
        file.write_bytes(data)
        lines = sum(bool(line.strip()) for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"))
        said, kept = _read(file), _read(file, skip=True)
        wrong = None
        if isinstance(said, int) and said != lines:
            wrong = f"{data!r}: {said} rows of {lines}"
        elif isinstance(kept, tuple) and sum(kept) != lines:
            wrong = f"{data!r}: {kept} of {lines} lines kept and counted"
        elif isinstance(said, str) and not said.startswith((f"{file}:", "data.train")):
            wrong = f"{data!r}: {said}"
        outcome.add(wrong)

    case()
    return outcome


def _jsons() -> st.SearchStrategy[bytes]:
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names(), inner, max_size=4),
        max_leaves=8,
    )
    rows = st.dictionaries(_names(), values, max_size=4)
    return st.lists(rows, max_size=4).map(lambda several: "\n".join(json.dumps(row) for row in several).encode())


def _names() -> st.SearchStrategy[str]:
    known = ("query", "context", "response", "reference", "prompt", "completion", "role", "content", "reward_model")
    return st.sampled_from((*known, "ground_truth", "privileged_context")) | st.text(max_size=3)


def _changed() -> st.SearchStrategy[bytes]:
    def change(number: int) -> bytes:
        draw = random.Random(number)
        data = bytearray("\n".join([GOOD] * 3).encode())
        for _ in range(draw.randint(1, 4)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        return bytes(data)

    return st.integers(0, 2**32).map(change)


def _read(file: Path, skip: bool = False) -> int | tuple[int, int] | str:
    """The number of rows; with `skip`, also of those left out with a warning; or the message of an error."""
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            kept = len(read_examples(str(file), on_bad_row="skip" if skip else "raise"))
    except UserError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if not skip:
        return kept
    counts = [int(str(warning.message).split()[1]) for warning in said if "bad rows skipped" in str(warning.message)]
    return kept, sum(counts)
