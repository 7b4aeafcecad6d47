"""Context files, and which example gets which context."""

import collections
import hashlib

import pytest

from opcd.data import ContextSource, context_hash, read_contexts
from opcd.runtime.errors import UserError


@pytest.mark.parametrize(
    ("name", "content", "contexts"),
    [
        ("rules.txt", "Rule one.\n\nRule two.\n", ["Rule one.\n\nRule two."]),
        ("rules", "# Rules", ["# Rules"]),
        ("list.json", '["a", " b\\n"]', ["a", "b"]),
        ("list.jsonl", '{"context": "a", "score": 1}\n\n"b"\n', ["a", "b"]),
    ],
)
def test_read_contexts(tmp_path, name, content, contexts):
    (tmp_path / name).write_text(content)
    assert read_contexts(str(tmp_path / name)) == contexts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("c.txt", b" \n", r"c\.txt: the context \(data\.context\) is empty"),
        ("c.txt", b"a\n\xff", r"c\.txt:2: not valid UTF-8"),
        ("c.json", b"[]", r"data\.context: .*c\.json has no contexts"),
        ("c.json", b'["a", ""]', r"c\.json: entry 2: the context \(data\.context\) is empty"),
        ("c.json", b'{"a": 1}', r"data\.context: .*c\.json must hold a list of texts"),
        ("c.jsonl", b'"a"\n{"text": "b"}', r"c\.jsonl:2: a context \(data\.context\) must be text"),
        ("c.jsonl", b"\n", r"data\.context: .*c\.jsonl has no contexts"),
    ],
)
def test_wrong_context_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_contexts(str(tmp_path / name))


def test_a_missing_context_file(tmp_path):
    with pytest.raises(UserError, match=rf"^data\.context: no file {tmp_path}/lessons\.txt$"):
        read_contexts(str(tmp_path / "lessons.txt"))


def test_own_context_wins(example):
    source = ContextSource(["shared"], seed=0)
    assert source.context_for(example("q", context="own"), epoch=3) == "own"
    assert source.context_for(example("q"), epoch=3) == "shared"


def test_draws_are_a_function_of_seed_epoch_and_index(example):
    contexts = ["a", "b", "c", "d"]

    def draws(seed, epoch, order=range(400)):
        source = ContextSource(contexts, seed)
        return {i: source.context_for(example("q", index=i), epoch) for i in order}

    assert draws(0, 0) == draws(0, 0, reversed(range(400)))
    assert draws(0, 0) != draws(0, 1)
    assert draws(0, 0) != draws(1, 0)
    counts = collections.Counter(draws(0, 0).values())
    assert all(70 < counts[context] < 130 for context in contexts)  # 100 each: within 3.5 standard deviations
    # Pinned: a checkpoint resumed under another version must draw the same.
    assert "".join(list(draws(7, 2).values())[:8]) == "bbbdadba"


def test_a_row_without_context_is_refused(example):
    with pytest.raises(UserError, match=r"^rows\.jsonl:2: no context: give the row one, or set data\.context$"):
        ContextSource(None, 0).check({"train": [example("q", context="c"), example("q", index=1)]})


def test_contexts_that_no_row_uses_are_refused(example):
    source, own, plain = ContextSource(["c"], 0), example("q", context="own"), example("q", index=1)
    source.check({"train": [own, plain]})
    source.check({"train": [own], "val": [plain]})
    source.check({"val": [own]}, complete=False)
    with pytest.raises(UserError, match=r"^data\.context has no effect: every row has a context of its own"):
        source.check({"train": [own], "val": [own]})


def test_context_hash():
    assert context_hash(["é"]) == hashlib.sha256((2).to_bytes(8, "big") + "é".encode()).hexdigest()
    assert len({context_hash(c) for c in ([], ["ab"], ["a", "b"], ["b", "a"])}) == 4
