"""JSON lines end at a line feed and nowhere else: U+2028 and its like are text."""

import json
from dataclasses import asdict

import pytest

from opcd.experience.rounds_table import TABLE, Round, read_rounds
from opcd.results.run_files import read_jsonl as read_rows_of_a_run
from opcd.results.run_files import read_shaped
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import parse_json, read_jsonl
from opcd.writing.journal import Journal

ENDS_FOR_STR = ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]
"""What `str.splitlines` splits at too."""


@pytest.mark.case("B2")
def test_lines_end_at_a_line_feed_alone(tmp_path):
    rows = [{"answer": f"before{end}after"} for end in ENDS_FOR_STR]
    file = tmp_path / "samples.jsonl"
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    assert [row for _, row in read_jsonl(file, "key")] == rows
    assert read_rows_of_a_run(file) == rows
    assert read_shaped(file, {"answer": str}, first=4) == rows[:4]
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append(rows)
    assert [row["answer"] for row in Journal(tmp_path / "journal.jsonl").records] == [row["answer"] for row in rows]
    one = asdict(Round(1, 0.0, 0.0, 0.0, 1, 1, None, 0.0, 1))
    (tmp_path / TABLE).write_text(json.dumps(one) + "\n" + json.dumps(one) + "\n")
    assert len(read_rounds(tmp_path, [])) == 2


class Counted(str):
    """A name that counts how often it is compared."""

    compared = 0

    def __eq__(self, other):
        Counted.compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.mark.case("E12")
@pytest.mark.timeout(60)
def test_a_row_of_many_keys_with_one_twice_is_refused_in_linear_time(monkeypatch):
    from opcd.runtime.files import user_files as files

    pairs = [(Counted(f"key{n}"), 0) for n in range(20_000)] + [(Counted("key19999"), 1)]
    with pytest.raises(ValueError, match="an object has 'key19999' twice"):
        files._object(pairs)
    assert Counted.compared < 10 * len(pairs)
    text = "{" + ", ".join(f'"key{n}": 0' for n in range(120_000)) + ', "key119999": 1}'
    with pytest.raises(UserError, match="file:1: not valid JSON: an object has 'key119999' twice"):
        parse_json(text, "file:1")


@pytest.mark.case("A11")
@pytest.mark.parametrize("text", ["9" * 5000, "[" * 10**5, '{"a":' * 10**5, "-" + "1" * 5000, '{"a": 1e5000'])
def test_odd_json_is_a_mistake_of_the_users(text):
    with pytest.raises(UserError, match="not valid JSON"):
        parse_json(text, "file")


@pytest.mark.case("E12")
def test_a_message_does_not_repeat_a_name_without_end():
    name = "k" * 10**6
    with pytest.raises(UserError) as caught:
        parse_json(f'{{"{name}": 1, "{name}": 2}}', "file")
    assert len(str(caught.value)) < 500
