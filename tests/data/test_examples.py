"""Row shapes, and what a wrong row is told."""

import logging

import pytest

from opcd.data import parse_row, parse_rows
from opcd.errors import UserError

# The shape of DAPO-Math-17k on the hub.
DAPO = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "Solve the problem.\n\nWhat is 2 + 2?"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "4", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "a"},
}


def test_native_row():
    example = parse_row({"query": "q", "context": "c", "response": "r", "reference": "4", "id": 7}, "f.jsonl:3", 2)
    assert (example.query, example.context, example.response, example.reference) == ("q", "c", "r", "4")
    assert (example.index, example.source) == (2, "f.jsonl:3")


def test_only_the_query_is_required():
    example = parse_row({"query": "q", "context": None}, "f:1", 0)
    assert (example.context, example.response, example.reference) == (None, None, None)


@pytest.mark.parametrize(("value", "text"), [("a", "a"), (4, "4"), (0.5, "0.5"), (["a", 1], '["a", 1]'), (None, None)])
def test_a_reference_becomes_text(value, text):
    assert parse_row({"query": "q", "reference": value}, "f:1", 0).reference == text


def test_trl_row():
    example = parse_row({"prompt": "q", "completion": "r", "privileged_context": "c", "key": 1}, "f:1", 0)
    assert (example.query, example.response, example.context) == ("q", "r", "c")


def test_trl_conversation():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q", "name": None}]
    example = parse_row({"prompt": messages, "completion": [{"role": "assistant", "content": "r"}]}, "f:1", 0)
    assert example.query == [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert example.response == "r"


def test_dapo_row():
    example = parse_row(DAPO, "f:1", 0)
    assert (example.query, example.reference, example.context) == (DAPO["prompt"], "4", None)


def test_copies_of_a_dapo_problem_are_dropped_and_counted(caplog):
    other_answer = DAPO | {"reward_model": {"ground_truth": "5"}}
    copy = DAPO | {"extra_info": {"index": "b"}, "prompt": [dict(reversed(DAPO["prompt"][0].items()))]}
    rows = [("f:1", DAPO), ("f:2", copy), ("f:3", other_answer), ("f:4", copy)]
    with caplog.at_level(logging.INFO):
        examples = parse_rows(rows, "data.val")
    assert [(e.source, e.index, e.reference) for e in examples] == [("f:1", 0, "4"), ("f:3", 1, "5")]
    assert "data.val: dropped 2 copies of problems; 2 rows remain" in caplog.text


def test_equal_rows_of_other_shapes_stay():
    assert len(parse_rows([("f:1", {"query": "q"}), ("f:2", {"query": "q"}), ("f:3", {"prompt": "q"})], "k")) == 3


USER = {"role": "user", "content": "q"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["q"], "a row must be an object, not a list"),
        ({"question": "q", "id": 1}, r"no query: the row has the keys \['id', 'question'\]; accepted are \{query,"),
        ({"query": None}, "query is missing"),
        ({"query": " \n"}, "query is empty"),
        ({"query": 3}, "query must be text or a list of messages, not int"),
        ({"prompt": {"a": 1}}, "prompt must be text or a list of messages, not an object"),
        ({"query": "q", "contxt": "c"}, "unknown key 'contxt'; did you mean context"),
        ({"query": "q", "Response": "c"}, "unknown key 'Response'; did you mean response"),
        ({"query": "q", "context": ["c"]}, "context must be text, not a list"),
        ({"query": "q", "context": ""}, "context is empty"),
        ({"query": "q", "response": ""}, "response is empty"),
        ({"query": "q", "reference": {"a": 1}}, "reference must be text, a number or a list, not an object"),
        ({"prompt": "q", "privileged_context": 3}, "privileged_context must be text, not int"),
        ({"prompt": "q", "completion": " "}, "completion is empty"),
        ({"prompt": "q", "completion": [USER]}, "completion must be text or one message of the assistant"),
        ({"query": []}, "the last message of query must be the user's"),
        ({"query": [USER, {"role": "assistant", "content": "a"}]}, "the last message of query must be the user's"),
        ({"query": [{"role": "user", "content": " "}]}, "the last message of query is empty"),
        ({"query": ["q"]}, r"query\[0\] must be a message with role and content, not text"),
        ({"query": [USER, {"role": "user"}]}, r"query\[1\] must have a role and a content.*it has \['role'\]"),
        ({"query": [USER | {"tool_calls": []}]}, r"query\[0\] must have a role and a content.*'tool_calls'"),
        ({"query": [{"role": "human", "content": "q"}]}, r"query\[0\] has the role 'human'; known are system"),
        (DAPO | {"prompt": None}, "prompt is missing"),
        (DAPO | {"reward_model": {"ground_truth": {}}}, "reward_model.ground_truth must be text, a number or a list"),
    ],
)
def test_a_wrong_row_is_refused(row, message):
    with pytest.raises(UserError, match=rf"^train\.jsonl:12: {message}") as raised:
        parse_row(row, "train.jsonl:12", 0)
    assert "train.jsonl:12: train.jsonl:12" not in str(raised.value)
