"""One example, and the row shapes that it is read from: the project's own, TRL's and DAPO-Math-17k's."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from opcd.data.files import check_text
from opcd.did_you_mean import did_you_mean
from opcd.errors import UserError

Message = dict[str, str]
OnBadRow = Literal["raise", "skip"]
"""What a row that is wrong does: `data.on_bad_row`."""

NATIVE_KEYS = ("query", "context", "response", "reference", "teacher")
ROLES = ("system", "user", "assistant", "tool")
ACCEPTED = (
    "accepted are {query, context, response, reference, teacher}, {prompt, completion, privileged_context}, "
    "DAPO-Math-17k, {content, answer}"
)


@dataclass  # not frozen: Lightning's true-precision plugins copy batches field by field
class Example:
    """A query, and what is known about it.

    Attributes:
        query: text, or chat messages ({"role": ..., "content": ...}) of which the last is the user's.
        context: the example's own context, which the teacher sees; None: the data set's.
        response: a recorded response.
        reference: what an answer is compared with; never shown to a model.
        index: number of the row in its data set, after reading.
        source: where it was read, such as "train.jsonl:12".
        teacher: name of the teacher that scores it; None where there is only one.
    """

    query: str | list[Message]
    context: str | None
    response: str | None
    reference: str | None
    index: int
    source: str
    teacher: str | None = field(default=None, kw_only=True)


def parse_rows(rows: Iterable[tuple[str, object]], key: str, on_bad_row: OnBadRow = "raise") -> list[Example]:
    """Examples from (source, raw row) pairs. Copies of a DAPO-Math-17k problem are dropped, and their number logged.

    On the hub that set holds each problem about a hundred times by accident.

    Args:
        rows: where each row was read, and the row, or the UserError that says why there is none.
        key: the config key of their source, for messages.
        on_bad_row: raise an error for the first wrong row, or leave all such rows out with one warning.

    Raises:
        UserError: a row is in no accepted shape, or one of its fields is wrong.
    """
    examples: list[Example] = []
    problems: set[str] = set()
    bad: list[str] = []
    copies = 0
    for source, row in rows:
        if _is_dapo(row):
            problem = json.dumps([row["prompt"], row["reward_model"]["ground_truth"]], sort_keys=True, default=str)
            if problem in problems:
                copies += 1
                continue
            problems.add(problem)
        try:
            examples.append(parse_row(row, source, len(examples)))
        except UserError as error:
            if on_bad_row == "raise":
                raise
            bad.append(str(error))
    if not bad and not copies:
        return examples
    from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn  # seconds, that others need not wait

    if bad:
        rank_zero_warn(f"{key}: {len(bad)} bad rows left out (data.on_bad_row: skip), {len(examples)} kept: {bad[0]}")
    if copies:
        rank_zero_info(f"{key}: dropped {copies} copies of problems; {len(examples)} rows remain")
    return examples


def parse_row(row: object, source: str, index: int) -> Example:
    """An example from one raw row.

    Raises:
        UserError: names the source and the field.
    """
    if isinstance(row, UserError):
        raise row
    if not isinstance(row, dict):
        raise UserError(f"{source}: a row must be an object, not {_kind(row)}; {ACCEPTED}")
    if _is_dapo(row):
        fields = {"query": row["prompt"], "reference": row["reward_model"]["ground_truth"]}
        names = {"query": "prompt", "reference": "reward_model.ground_truth"}
    elif "prompt" in row and "query" not in row:
        names = {"query": "prompt", "response": "completion", "context": "privileged_context"}
        fields = {field: row.get(name) for field, name in names.items()}
        fields["response"] = _completion(fields["response"], source)
    elif (
        "content" in row and "answer" in row and "query" not in row
    ):  # the paper's sets of its system-prompt experiments
        names = {"query": "content", "reference": "answer"}
        fields = {field: row[name] for field, name in names.items()}
    else:
        _check_native_keys(row, source)
        names, fields = {}, row
    return Example(
        query=_query(fields.get("query"), source, names.get("query", "query")),
        context=_text(fields.get("context"), source, names.get("context", "context")),
        response=_text(fields.get("response"), source, names.get("response", "response")),
        reference=_reference(fields.get("reference"), source, names.get("reference", "reference")),
        index=index,
        source=source,
        teacher=_text(row.get("teacher"), source, "teacher"),
    )


def _is_dapo(row: object) -> TypeGuard[dict[str, Any]]:
    if not isinstance(row, dict) or "prompt" not in row:
        return False
    reward = row.get("reward_model")
    return isinstance(reward, dict) and "ground_truth" in reward


def _check_native_keys(row: dict[str, Any], source: str) -> None:
    for name in row.keys() - set(NATIVE_KEYS):
        if hint := did_you_mean(str(name), NATIVE_KEYS, cutoff=0.8):
            raise UserError(f"{source}: unknown key {name!r}{hint}")
    if "query" not in row:
        raise UserError(f"{source}: no query: the row has the keys {sorted(map(str, row))}; {ACCEPTED}")


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


def _completion(value: object, source: str) -> object:
    """The text of TRL's completion: text already, or one message of the assistant."""
    if not isinstance(value, list):
        return value
    if len(value) != 1 or _message(value[0], f"{source}: completion[0]")["role"] != "assistant":
        raise UserError(f"{source}: completion must be text or one message of the assistant")
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
        return value
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    raise UserError(f"{source}: {name} must be text, a number or a list, not {_kind(value)}")


def _kind(value: object) -> str:
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "text", type(None): "null"}
    return kinds.get(type(value), type(value).__name__)
