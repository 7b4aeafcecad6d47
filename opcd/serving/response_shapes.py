"""What a server's answers look like: checked once, before anything is made of them."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from opcd.serving.client import ServerError

ROUNDING = 1e-3
"""Nats by which a log-probability may lie above 0."""
LARGEST = 2**31
"""No vocabulary has as many tokens."""

Shape = Callable[[Any, str], None]
"""Raises ServerError where a value, which stands at a place of an answer, is not of this shape."""


def count(value: Any, where: str) -> None:
    """A whole number from 0 on."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**53:
        raise wrong(where, "a whole number from 0 on", value)


def token_id(value: Any, where: str) -> None:
    """An id of a vocabulary."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
        raise wrong(where, "a token's id", value)


def log_prob(value: Any, where: str) -> None:
    """A finite number that is at most 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(where, "a number", value)
    if not math.isfinite(value) or value > ROUNDING:
        raise ServerError(f"{where}: {value} for a log-probability, which is finite and at most 0")


def text(value: Any, where: str) -> None:
    """A text."""
    if not isinstance(value, str):
        raise wrong(where, "a text", value)


def anything(value: Any, where: str) -> None:
    """Whatever it is."""


def optional(shape: Shape) -> Shape:
    """That shape, or null."""

    def check(value: Any, where: str) -> None:
        """Null, or of the shape."""
        if value is not None:
            shape(value, where)

    return check


def list_of(shape: Shape, length: int | None = None, most: int | None = None) -> Shape:
    """A list, of this length or of so many at most."""

    def check(value: Any, where: str) -> None:
        """A list whose values are of the shape."""
        if not isinstance(value, list):
            raise wrong(where, "a list", value)
        if length not in (None, len(value)):
            raise ServerError(f"{where}: {len(value)} values where {length} are due")
        if most is not None and len(value) > most:
            raise ServerError(f"{where}: {len(value)} values where {most} were asked for at most")
        for number, one in enumerate(value):
            shape(one, f"{where}[{number}]")

    return check


def fields(shapes: Mapping[str, Shape]) -> Shape:
    """An object with these fields, among others; a field that is not there is null."""

    def check(value: Any, where: str) -> None:
        """An object whose fields are of their shapes."""
        if not isinstance(value, dict):
            raise wrong(where, "an object", value)
        for name, shape in shapes.items():
            shape(value.get(name), f"{where}.{name}")

    return check


def table(value: Any, where: str) -> None:
    """Tokens of a position, by their ids as text, each with its log-probability."""
    if not isinstance(value, dict):
        raise wrong(where, "a table of tokens", value)
    for key, entry in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < LARGEST):
            raise wrong(where, "a token's id", key)
        if not isinstance(entry, dict):
            raise wrong(f"{where}[{key}]", "an object", entry)
        log_prob(entry.get("logprob"), f"{where}[{key}].logprob")


def wrong(where: str, due: str, value: Any) -> ServerError:
    """What an answer has in place of what is due; not more of it than its kind and its beginning."""
    shown = repr(value)[:40] if isinstance(value, int | float | str | None) else type(value).__name__
    return ServerError(f"an answer that is not of vLLM's form: {where} is {shown}, not {due}")


MODELS = fields(
    {
        "data": list_of(
            fields({"id": text, "root": optional(text), "parent": optional(text), "max_model_len": optional(count)})
        )
    }
)
"""The list of models."""
TOKENS = fields({"tokens": list_of(token_id)})
"""A text's tokens."""
CACHED = fields({"usage": fields({"prompt_tokens_details": fields({"cached_tokens": count})})})
"""How much of a prompt was cached."""


def completion(most: int | None, vocabulary: int | None) -> Shape:
    """One response: its tokens and their log-probabilities."""

    def known(value: Any, where: str) -> None:
        """An id of the student's vocabulary."""
        token_id(value, where)
        if vocabulary is not None and value >= vocabulary:
            raise ServerError(f"{where}: token {value} of a model that has {vocabulary}")

    one = {"token_ids": list_of(known, most=most), "logprobs": fields({"token_logprobs": list_of(log_prob)})}
    return fields({"choices": list_of(fields(one), length=1)})
