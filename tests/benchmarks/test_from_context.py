"""The texts of the benchmarks that begin with a context alone, and how they are scored."""

import argparse

import pytest

from benchmarks.from_context import DOCUMENTS, Document, read
from benchmarks.from_prompt import RULES, TEXTS, kept
from opcd.tasks.matching import holds

PROMPT = (TEXTS / "shop_prompt.txt").read_text(encoding="utf-8")
GOOD = PROMPT[PROMPT.index("Welcome, friend.") :].strip()
BAD = {
    "begins with Welcome": "Hi. " + GOOD,
    "says friend": GOOD.replace(", friend", ""),
    "at most 60 words": GOOD.replace("We", "word " * 60 + "We"),
    "no list, heading or bold": GOOD.replace("\n", "\n- "),
    "one paragraph": GOOD.replace(". ", ".\n"),
    "no exclamation mark": GOOD.replace(".", "!", 1),
    "no other currency": GOOD.replace("brins", "euros"),
    "the address once": GOOD.replace("help@kettlewick.example", "us"),
    "no emoji": GOOD.replace("friend", "friend \U0001f600"),
    "the sign-off last": GOOD + "\nBye",
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_question_stands_under_the_chunk_that_answers_it(tmp_path, name):
    document = Document(name, 256, "smollm2-135m")
    rows = read(document.val(tmp_path / "val.jsonl"))
    assert len(rows) == 30 and all(holds(row["context"], row["reference"]) for row in rows)
    assert all(any(holds(row["reference"], answer) for answer in row["answers"]) for row in document.questions)
    train, seconds = document.train("by_hand", tmp_path / "by_hand", argparse.Namespace())
    trained_on = read(train)
    assert len(trained_on) == (120 if name == "hiking_club" else 40) and seconds == 0
    assert {row["context"] for row in trained_on} == set(document.chunks)
    assert not {row["query"] for row in trained_on} & {row["query"] for row in rows}


def test_each_rule_of_the_shop_holds_on_the_example_and_fails_where_it_is_broken():
    assert set(kept([GOOD]).values()) == {1.0} and BAD.keys() == RULES.keys()
    for name, answer in BAD.items():
        assert kept([answer])[name] == 0, name
    assert kept([GOOD, "Hi!"])["no exclamation mark"] == 0.5
