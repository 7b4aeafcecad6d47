"""Files and hub data sets, and what is said of those that cannot be read."""

import gzip
import json
import os
import re

import pyarrow
import pyarrow.parquet
import pytest

from opcd.data import read_contexts, read_examples, read_rows
from opcd.runtime.errors import UserError


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
    (tmp_path / "rows.txt").write_text("query\na\n")
    (tmp_path / "data.jsonl").mkdir()
    (tmp_path / "data.jsonl" / "rows.txt").write_text("query\na\n")  # a file, though it reads like a hub id
    assert refusal("rows.txt") == (
        "data.train: 'rows.txt' is neither a .jsonl, .json, .csv or .parquet file nor a hub data set (org/name:split, "
        "or org/name/config:split)"
    )
    assert refusal("data.jsonl/rows.txt").startswith("data.train: 'data.jsonl/rows.txt' is neither")
    assert refusal("gsm8k").startswith("data.train: 'gsm8k' is neither")
    assert refusal(tmp_path).startswith(f"data.train: {tmp_path} is a folder; name a file in it, or several by a patt")
    assert refusal("data.jsonl").startswith(f"data.train: {tmp_path}/data.jsonl is a folder; name a file in it")


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

    monkeypatch.setattr("opcd.data.readers.hub_reachable", lambda: False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # set in the test, and put back after it
    message = refusal("some-org/some-set:test[:10]", "data.test")
    assert re.match(r"data\.test: the hub could not be reached for some-org/some-set:test\[:10\]: ", message)
    assert "check the network" in message


@pytest.mark.case("D15")
def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbfquery,context,reference\r\n"a, b",,007\r\n\r\n"two\nlines",c,\r\n')
    found = [(e.query, e.context, e.reference, e.source) for e in read_examples(str(path))]
    assert found == [("a, b", None, "007", f"{path}:2"), ("two\nlines", "c", None, f"{path}:5")]
    assert dict(read_rows(str(path), "k"))[f"{path}:2"]["reference"] == "007"


@pytest.mark.case("D15")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query,context\na\n", ":2: 1 cells under 2 names; quote a cell that holds a comma"),
        ("query\na\nb,c\n", ":3: 2 cells under 1 names"),
        ("query,query\na,b\n", ":1: two columns are called 'query'"),
        ('query\n"a"b\n', ":2: not valid CSV: "),
        ('query\n"a\n', ":2: not valid CSV: unexpected end of data"),
        ("question\na\n", ":2: no query: the row has the keys ['question']"),
        ("query\n", " has no rows"),
        ("", " has no rows"),
    ],
)
def test_wrong_csv(tmp_path, text, message):
    (tmp_path / "rows.csv").write_text(text)
    assert f"{tmp_path}/rows.csv{message}" in refusal(tmp_path / "rows.csv")


@pytest.mark.case("D15")
def test_a_short_row_of_csv_can_be_skipped(tmp_path):
    (tmp_path / "rows.csv").write_text("query,context\na\nb,c\n")
    with pytest.warns(UserWarning, match="1 bad rows skipped"):
        assert [e.query for e in read_examples(str(tmp_path / "rows.csv"), on_bad_row="skip")] == ["b"]


@pytest.mark.case("D15")
def test_gzipped_files(tmp_path):
    for name, text in (("a.jsonl", '\n{"query": "a"}'), ("b.json", '[{"query": "b"}]'), ("c.csv", "query\nc")):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert [e.source for e in read_examples(str(tmp_path / "a.jsonl.gz"))] == [f"{tmp_path}/a.jsonl.gz:2"]
    assert [e.query for e in read_examples(f"{tmp_path}/*.gz")] == ["a", "b", "c"]
    (tmp_path / "contexts.json.gz").write_bytes(gzip.compress(b'["one", "two"]'))
    assert read_contexts(str(tmp_path / "contexts.json.gz")) == ["one", "two"]
    whole = (tmp_path / "a.jsonl.gz").read_bytes()
    for broken in (whole[:-4], whole[:15], b"plain", b"\x1f\x8b" + bytes(30)):
        (tmp_path / "a.jsonl.gz").write_bytes(broken)
        assert refusal(tmp_path / "a.jsonl.gz").startswith(
            f"data.train: {tmp_path}/a.jsonl.gz is no complete gzip file"
        )


@pytest.mark.case("D15")
def test_several_files_by_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "b.jsonl").write_text('{"query": "b"}')
    (tmp_path / "a.csv").write_text("query\na")
    (tmp_path / "more" / "c.jsonl").write_text('{"query": "c"}')
    assert [(e.query, e.index) for e in read_examples("[ab].*")] == [("a", 0), ("b", 1)]
    assert [e.query for e in read_examples("**/*.jsonl")] == ["b", "c"]
    assert refusal("d*.jsonl") == f"data.train: no file matches {tmp_path}/d*.jsonl"
    assert (
        refusal("*") == f"data.train: {tmp_path}/more is not a .jsonl, .json, .csv or .parquet file; narrow the pattern"
    )
    (tmp_path / "odd[1].jsonl").write_text('{"query": "odd"}')
    assert [e.query for e in read_examples("odd[1].jsonl")] == ["odd"]


@pytest.mark.case("D15")
@pytest.mark.parametrize("splits", [False, True])
def test_a_folder_of_save_to_disk_is_told_what_to_do(tmp_path, splits):
    import datasets

    rows = datasets.Dataset.from_list([{"query": "a"}])
    saved = datasets.DatasetDict({"train": rows}) if splits else rows
    saved.save_to_disk(tmp_path / "saved")
    message = refusal(tmp_path / "saved")
    assert f"datasets.load_from_disk('{tmp_path}/saved').to_parquet('rows.parquet')" in message
