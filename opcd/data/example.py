"""Examples, parsed from rows with the project's column names, TRL's, DAPO-Math-17k's or the paper's."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, TypeGuard

from opcd.runtime.did_you_mean import near
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import check_text

Message = dict[str, str]
OnBadRow = Literal["raise", "skip"]
"""What happens to a malformed row (`data.on_bad_row`)."""

NAMES = {
    "query": ("query", "prompt", "messages", "content"),
    "context": ("context", "privileged_context"),
    "response": ("response", "completion"),
    "reference": ("reference", "reward_model", "answer"),
    "teacher": ("teacher",),
}
"""The column names of each field. Names of different shapes can be combined."""
KNOWN = [name for names in NAMES.values() for name in names]
_SYSTEM = 'make it the first message of the query: [{"role": "system", "content": ...}, {"role": "user", ...}]'
_TEXT_ONLY = "models are trained on text alone; leave such rows out, or remove the column"
_NO_TOOLS = "a chat template would show it, and it is not passed on; leave such rows out, or remove the column"
_SHAREGPT = (
    'that is ShareGPT\'s shape: rename it to messages, and "from", "value" to "role", "content" (human: user, gpt: '
    "assistant)"
)
_ALPACA = "that is Alpaca's shape: join instruction and input to a query, and rename output to response"
UNREAD = {
    **dict.fromkeys(("system", "system_prompt"), _SYSTEM),
    **dict.fromkeys(("tools", "functions", "documents"), _NO_TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _TEXT_ONLY),
    "chat_template_kwargs": "they hold for all rows: set model.student.chat_template_kwargs, and remove the column",
    "conversations": _SHAREGPT,
    "instruction": _ALPACA,
}
"""Columns that change what a prompt says but are not read, each with advice."""
ANCHORS = "anchors"
"""The teacher of anchors (`data.anchors`): the student before training. They have no context."""
ROLES = ("system", "user", "assistant", "tool")
ACCEPTED = (
    "accepted are {query, context, response, reference, teacher}, {prompt, completion, privileged_context}, "
    "{messages}, DAPO-Math-17k, {content, answer}"
)
"""The shapes of rows to train on, for messages."""


@dataclass  # not frozen: Lightning's true-precision plugins copy batches field by field
class Example:
    """A query, and what belongs to it.

    Attributes:
        query: text, or chat messages ({"role": ..., "content": ...}) of which the last is the user's.
        context: the example's own context, which the teacher sees. None: the data set's.
        response: a recorded response.
        reference: the answer to compare with; never shown to a model.
        index: number of the row in its data set, after reading.
        source: where it was read, such as "train.jsonl:12".
        teacher: name of the teacher that scores it. None: there is only one.
    """

    query: str | list[Message]
    context: str | None
    response: str | None
    reference: str | None
    index: int
    source: str
    teacher: str | None = field(default=None, kw_only=True)


def parse_rows(
    rows: Iterable[tuple[str, object]], key: str, on_bad_row: OnBadRow = "raise", accepted: str = ACCEPTED
) -> list[Example]:
    """Examples from (source, raw row) pairs.

    Copies of a DAPO-Math-17k problem are dropped: on the hub each problem occurs about a hundred times by accident.
    Their number is logged, and so are columns that are not read.

    Args:
        rows: where each row was read, and the row, or the UserError that says why it could not be read.
        key: the config key of their source, for messages.
        on_bad_row: raise an error for the first malformed row, or skip all such rows with one warning.
        accepted: the accepted shapes of rows, for messages.

    Raises:
        UserError: a row has no accepted shape, or one of its fields is wrong.
    """
    examples: list[Example] = []
    problems: set[str] = set()
    bad: list[str] = []
    other: dict[str, None] = {}
    copies = 0
    for source, row in rows:
        if _is_dapo(row):
            problem = json.dumps({name: _value(row, name) for name in KNOWN}, sort_keys=True, default=str)
            if problem in problems:
                copies += 1
                continue
            problems.add(problem)
        try:
            examples.append(parse_row(row, source, len(examples), accepted))
        except UserError as error:
            if on_bad_row == "raise":
                raise
            bad.append(str(error))
        else:
            other |= dict.fromkeys(str(name) for name in row if name not in KNOWN)  # type: ignore[attr-defined]
    if not (bad or copies or other):
        return examples
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn  # takes seconds

    if bad:
        rank_zero_warn(f"{key}: {len(bad)} bad rows skipped (data.on_bad_row: skip), {len(examples)} kept: {bad[0]}")
    if copies:
        rank_zero_info(f"{key}: dropped {copies} copies of problems; {len(examples)} rows remain")
    if other:
        more = f" and {len(other) - 12} more" if len(other) > 12 else ""
        rank_zero_info(f"{key}: columns that are not read: {', '.join(list(other)[:12])}{more}")
    return examples


def parse_row(row: object, source: str, index: int, accepted: str = ACCEPTED) -> Example:
    """An example from one raw row; `accepted` is the accepted shapes of rows, for messages.

    Raises:
        UserError: names the source and the field.
    """
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{source}: a row must be an object, not {_kind(row)}; {accepted}")
    refuse_unread(row, source)
    _refuse_misspelt(row, source)
    names = {field: _name(row, field, source) for field in NAMES}
    if names["query"] is None:
        keys = sorted(map(str, row))
        shown = f"{keys[:20]} and {len(keys) - 20} more" if len(keys) > 20 else str(keys)
        raise UserError(f"{source}: no query: the row has the keys {shown}; {accepted}")
    values = {field: None if name is None else _value(row, name) for field, name in names.items()}
    if names["query"] == "messages":
        values["query"], answer = _without_answer(values["query"], source)
        if answer is not None and values["response"] is not None:
            raise UserError(f"{source}: messages and {names['response']} both give the response; keep one of the two")
        values["response"] = values["response"] if answer is None else answer
    response = names["response"] or "response"
    return Example(
        query=_query(values["query"], source, names["query"]),
        context=_text(values["context"], source, names["context"] or "context"),
        response=_text(_completion(values["response"], source, response), source, response),
        reference=_reference(values["reference"], source, _shown(names["reference"] or "reference")),
        index=index,
        source=source,
        teacher=_text(values["teacher"], source, "teacher"),
    )


def refuse_unread(row: dict[str, Any], source: str) -> None:
    """Raise an error for a row with a column that changes its prompt but is not read (`UNREAD`).

    Raises:
        UserError: names the column, and says what to do.
    """
    for name, value in row.items():
        if (advice := UNREAD.get(str(name).lower())) is not None and value not in (None, "", [], {}):
            raise UserError(f"{source}: the column {name!r} is not read: {advice}")


def _refuse_misspelt(row: dict[str, Any], source: str) -> None:
    if len(row) > 1000:  # not written by hand; each name takes a tenth of a millisecond
        return
    for name in map(str, row):
        meant = None if name in KNOWN or len(name) > 32 else _nearest(name.lower())
        if meant is not None and meant not in row:
            raise UserError(f"{source}: unknown key {name!r}; did you mean {meant}?")


@lru_cache(maxsize=4096)  # rows have the same columns
def _nearest(name: str) -> str | None:
    """The known name that was probably meant; None for names such as `prompt_id`."""
    found = near(name, KNOWN, cutoff=0.8)
    return None if found is None or name.startswith(f"{found}_") else found


def _name(row: dict[str, Any], field: str, source: str) -> str | None:
    """The row's name of a field: the one with a value, else one without, else None."""
    there = [name for name in NAMES[field] if name in row]
    given = [name for name in there if _value(row, name) is not None]
    if len(given) > 1:
        both = " and ".join(map(_shown, given))
        raise UserError(f"{source}: {both} both give the {field}; keep one of the two")
    return next(iter([*given, *there]), None)


def _value(row: dict[str, Any], name: str) -> Any:
    """The value of a column; for DAPO-Math-17k's `reward_model` the right answer."""
    value = row.get(name)
    if name != "reward_model":
        return value
    return value.get("ground_truth") if isinstance(value, dict) else None


def _shown(name: str) -> str:
    return "reward_model.ground_truth" if name == "reward_model" else name


def rows_hash(examples: Iterable[Example]) -> str:
    """SHA-256, in hex, of what training sees of rows, in their order: not their sources or references."""
    digest = hashlib.sha256()
    for example in examples:
        seen = [example.query, example.context, example.response, example.teacher]
        digest.update(json.dumps(seen, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _is_dapo(row: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(row, dict) and "prompt" in row and _value(row, "reward_model") is not None


def _without_answer(messages: object, source: str) -> tuple[object, str | None]:
    """The messages up to the user's last one, and the assistant's answer to it, if there is one."""
    if not isinstance(messages, list):
        raise UserError(f"{source}: messages must be a list of messages, not {_kind(messages)}")
    last = messages[-1] if messages else None
    if len(messages) < 2 or not isinstance(last, dict) or last.get("role") != "assistant":
        return messages, None
    return messages[:-1], _message(last, f"{source}: messages[{len(messages) - 1}]")["content"]


def _query(value: object, source: str, name: str) -> str | list[Message]:
    if isinstance(value, list):
        return _messages(value, source, name)
    text = _text(value, source, name, "text or a list of messages")
    if text is None:
        raise UserError(f"{source}: {name} is missing")
    return text


def _messages(value: list[object], source: str, name: str) -> list[Message]:
    messages = [_message(message, f"{source}: {name}[{number}]") for number, message in enumerate(value)]
    if not messages or messages[-1]["role"] != "user":
        raise UserError(f"{source}: the last message of {name} must be the user's: a response to it is what is trained")
    if not messages[-1]["content"].strip():
        raise UserError(f"{source}: the last message of {name} is empty")
    return messages


def _message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a message with role and content, not {_kind(value)}")
    message = {str(name): item for name, item in value.items() if item is not None}
    if message.keys() != {"role", "content"} or not isinstance(message["content"], str):
        raise UserError(f"{where} must have a role and a content, both text, and no more; it has {sorted(message)}")
    check_text(message["content"], f"{where}.content")
    if message["role"] not in ROLES:
        raise UserError(f"{where} has the role {message['role']!r}; known are {', '.join(ROLES)}")
    return message


def _completion(value: object, source: str, name: str) -> object:
    """The text of a response, which is text or, as in TRL, one message of the assistant."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or _message(value[0], f"{source}: {name}[0]")["role"] != "assistant":
        raise UserError(f"{source}: {name} must be text or one message of the assistant")
    return value[0]["content"]


def _text(value: object, source: str, name: str, expected: str = "text") -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise UserError(f"{source}: {name} must be {expected}, not {_kind(value)}")
    if not value.strip():
        raise UserError(f"{source}: {name} is empty; give it text, or remove it (the whole row, where it is the query)")
    check_text(value, f"{source}: {name}")
    return value


def _reference(value: object, source: str, name: str) -> str | None:
    if value is None or isinstance(value, str):
        return value if value and value.strip() else None
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    raise UserError(f"{source}: {name} must be text, a number or a list, not {_kind(value)}")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
