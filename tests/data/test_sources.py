"""Files and hub data sets, and what is said of those that cannot be read."""

import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from opcd.data import read_examples
from opcd.errors import UserError


def refusal(source, key="data.train"):
    with pytest.raises(UserError) as raised:
        read_examples(str(source), key)
    return str(raised.value)


def test_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "a"}\r\n\n  \n{"query": "\xc3\xa9\xe2\x80\xa8b"}')  # BOM, U+2028 in a text
    examples = read_examples(str(path))
    assert [(e.query, e.index, e.source) for e in examples] == [("a", 0, f"{path}:1"), ("é\u2028b", 1, f"{path}:4")]


@pytest.mark.parametrize("wrap", [lambda rows: rows, lambda rows: {"data": rows, "version": 1}])
def test_json(tmp_path, wrap):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(wrap([{"query": "a"}, {"query": "b"}])))
    assert [(e.query, e.source) for e in read_examples(str(path))] == [("a", f"{path}: row 1"), ("b", f"{path}: row 2")]


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [
        {"query": [{"role": "user", "content": "a"}], "context": "c", "reference": 4},
        {"query": [{"role": "system", "content": "s"}, {"role": "user", "content": "b"}], "context": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    examples = read_examples(str(path))
    assert [e.query for e in examples] == [row["query"] for row in rows]
    assert [(e.context, e.reference) for e in examples] == [("c", "4"), (None, None)]


def test_a_malformed_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a"}\n\n{"query": \n')
    assert refusal(path).startswith(f"{path}:3: not valid JSON: ")


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"query": "a"}\n\xff\n')
    assert refusal(path).startswith(f"{path}:3: not valid UTF-8")


def test_a_wrong_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a"}\n{"query": ""}\n')
    assert refusal(path).startswith(f"{path}:2: query is empty")


def test_a_missing_file(tmp_path, monkeypatch):
    (tmp_path / "train.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert refusal("trian.jsonl", "data.val") == f"data.val: no file {tmp_path}/trian.jsonl; did you mean train.jsonl?"
    there = f"{tmp_path}/no/folder.jsonl; there is no folder {tmp_path}/no"
    assert refusal("no/folder.jsonl") == f"data.train: no file {there}"


def test_what_is_no_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text("query\na\n")
    (tmp_path / "data.jsonl").mkdir()
    (tmp_path / "data.jsonl" / "rows.csv").write_text("query\na\n")  # a file, though it reads like a hub id
    assert refusal("rows.csv").startswith("data.train: 'rows.csv' is neither a .jsonl, .json, .parquet file nor a hub")
    assert refusal("data.jsonl/rows.csv").startswith("data.train: 'data.jsonl/rows.csv' is neither")
    assert refusal("gsm8k").startswith("data.train: 'gsm8k' is neither")
    assert refusal(tmp_path) == f"data.train: {tmp_path} is a folder; name a file in it"
    assert refusal("data.jsonl") == f"data.train: {tmp_path}/data.jsonl is a folder; name a file in it"


def test_broken_files(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "object.json").write_text('{"rows": []}')
    (tmp_path / "broken.json").write_text('[\n{"query": "a"},\n')
    (tmp_path / "broken.parquet").write_text("PAR1")
    assert refusal(tmp_path / "empty.jsonl") == f"data.train: {tmp_path}/empty.jsonl has no rows"
    assert "must hold a list of rows" in refusal(tmp_path / "object.json")
    assert refusal(tmp_path / "broken.json").startswith(f"{tmp_path}/broken.json:3: not valid JSON")
    assert refusal(tmp_path / "broken.parquet").startswith(f"data.train: cannot read {tmp_path}/broken.parquet as Parq")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a"}')
    path.chmod(0)
    assert refusal(path) == f"data.train: cannot read {path}: Permission denied"


def test_the_hub_out_of_reach(monkeypatch):
    import datasets

    monkeypatch.setattr("opcd.data.sources.hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # set in the test, and put back after it
    message = refusal("some-org/some-set:test[:10]", "data.test")
    assert re.match(r"data\.test: the hub could not be reached for some-org/some-set:test\[:10\]: ", message)
    assert "check the network" in message
