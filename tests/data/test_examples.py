"""Row shapes, and what a wrong row is told."""

import logging

import pytest

from opcd.data import parse_row, parse_rows
from opcd.runtime.errors import UserError

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
ANSWER = {"role": "assistant", "content": "a"}


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


@pytest.mark.case("D5")
@pytest.mark.parametrize("query", ["query", "prompt", "messages", "content"])
@pytest.mark.parametrize("context", ["context", "privileged_context"])
@pytest.mark.parametrize("response", ["response", "completion"])
@pytest.mark.parametrize("reference", ["reference", "reward_model", "answer"])
def test_a_known_name_is_read_beside_any_other(query, context, response, reference):
    row = {
        query: [USER] if query == "messages" else "q",
        context: "c",
        response: "r",
        reference: {"ground_truth": 4, "style": "rule"} if reference == "reward_model" else 4,
        "teacher": "t",
    }
    example = parse_row(row, "f:1", 0)
    assert example.query in ("q", [USER])
    assert (example.context, example.response, example.reference, example.teacher) == ("c", "r", "4", "t")


@pytest.mark.case("D5")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"query": "q", "prompt": "p"}, "query and prompt both give the query; keep one"),
        ({"prompt": "p", "messages": [USER]}, "prompt and messages both give the query"),
        ({"prompt": "p", "context": "c", "privileged_context": "d"}, "context and privileged_context both give the"),
        ({"query": "q", "response": "c", "completion": "d"}, "response and completion both give the response"),
        (DAPO | {"reference": "5"}, "reference and reward_model.ground_truth both give the reference"),
        ({"prompt": "p", "Context": "c"}, "unknown key 'Context'; did you mean context"),
        (DAPO | {"privileged_contxt": "c"}, "unknown key 'privileged_contxt'; did you mean privileged_context"),
        ({"prompt": "p", "reponse": "c"}, "unknown key 'reponse'; did you mean response"),
    ],
)
def test_two_names_of_one_field_and_misspelt_ones_are_refused(row, message):
    with pytest.raises(UserError, match=f"^f:1: {message}"):
        parse_row(row, "f:1", 0)


@pytest.mark.case("D5")
def test_a_name_without_a_value_is_no_second_one():
    row = {"query": None, "prompt": "q", "context": None, "privileged_context": "c", "prompt_id": "x", "query_len": 3}
    example = parse_row(row, "f:1", 0)
    assert (example.query, example.context) == ("q", "c")


@pytest.mark.case("D5")
def test_a_problem_with_another_context_is_no_copy():
    rows = [DAPO | {"privileged_context": text} for text in ("one", "two", "one")]
    assert [e.context for e in parse_rows([(f"f:{n}", row) for n, row in enumerate(rows)], "k")] == ["one", "two"]


@pytest.mark.case("D5", "D12")
def test_columns_that_are_not_read_are_told(caplog):
    with caplog.at_level(logging.INFO):
        parse_rows([("f:1", DAPO), ("f:2", {"query": "q", "difficulty": 3})], "data.train")
    assert "data.train: columns that are not read: data_source, ability, extra_info, difficulty" in caplog.text


@pytest.mark.case("D12", "D15")
@pytest.mark.parametrize("shape", [{"query": "q"}, {"prompt": "q"}, {"messages": [USER]}, DAPO])
@pytest.mark.parametrize(
    ("column", "value", "advice"),
    [
        ("tools", [{"type": "function"}], "a chat template would show it"),
        ("functions", [{"name": "f"}], "a chat template would show it"),
        ("documents", [{"text": "d"}], "a chat template would show it"),
        ("chat_template_kwargs", {"enable_thinking": False}, "set model.student.chat_template_kwargs"),
        ("images", ["a.png"], "text alone"),
        ("image", b"png", "text alone"),
        ("audio", "a.wav", "text alone"),
        ("system", "You rhyme.", "make it the first message of the query"),
        ("System", "You rhyme.", "make it the first message of the query"),
        ("system_prompt", "You rhyme.", "make it the first message of the query"),
        ("conversations", [{"from": "human", "value": "q"}], "ShareGPT"),
        ("instruction", "Add.", "Alpaca"),
    ],
)
def test_a_column_that_changes_the_prompt_is_refused_by_name(shape, column, value, advice):
    with pytest.raises(UserError, match=rf"^f:1: the column '{column}' is not read: .*{advice}"):
        parse_row(shape | {column: value}, "f:1", 0)
    for empty in (None, "", [], {}):
        assert parse_row(shape | {column: empty}, "f:1", 0).index == 0


@pytest.mark.case("D15")
def test_rows_of_messages():
    system = {"role": "system", "content": "s"}
    example = parse_row({"messages": [system, USER, ANSWER]}, "f:1", 0)
    assert (example.query, example.response) == ([system, USER], "a")
    several = parse_row({"messages": [USER, ANSWER, USER]}, "f:1", 0)
    assert (several.query, several.response) == ([USER, ANSWER, USER], None)
    assert parse_row({"messages": [USER], "response": "r"}, "f:1", 0).response == "r"


@pytest.mark.case("D15")
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "q"}, "messages must be a list of messages, not text"),
        ({"messages": []}, "the last message of messages must be the user's"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last message of messages must be the user's"),
        (
            {"messages": [USER, {"role": "assistant", "content": "a"}], "completion": "b"},
            "messages and completion both",
        ),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, r"messages\[1\] must have a role and a content"),
        ({"messages": [USER, {"role": "assistant", "content": ""}]}, "response is empty"),
    ],
)
def test_wrong_messages_are_refused(row, message):
    with pytest.raises(UserError, match=f"^f:1: {message}"):
        parse_row(row, "f:1", 0)


@pytest.mark.case("E12")
def test_a_row_of_very_many_columns_is_read():
    row = {"query": "q"} | {f"column_{number}": number for number in range(100_000)}
    assert parse_row(row, "f:1", 0).query == "q"
    with pytest.raises(UserError, match="and 99980 more"):
        parse_row({f"column_{number}": number for number in range(100_000)}, "f:1", 0)
