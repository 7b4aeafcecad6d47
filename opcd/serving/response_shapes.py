"""The shapes of a server's answers, checked once, before the answers are used."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from opcd.serving.client import ServerError

ROUNDING = 1e-3
"""Nats by which a log-probability may lie above 0."""
LARGEST = 2**31
"""More tokens than any vocabulary has."""

Shape = Callable[[Any, str], None]
"""A check of a value and of its place in an answer, for messages; raises ServerError."""


def integer(below: int, due: str) -> Shape:
    """Make the shape of an integer from 0 to below a limit."""

    def check(value: Any, where: str) -> None:
        """Check the type and the limits."""
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < below:
            raise wrong(where, due, value)

    return check


def log_prob(value: Any, where: str) -> None:
    """Check for a finite number that is at most 0."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise wrong(where, "a number", value)
    if not math.isfinite(value) or value > ROUNDING:
        raise ServerError(f"{where}: {value} for a log-probability, which must be finite and at most 0")


def text(value: Any, where: str) -> None:
    """Check for a text."""
    if not isinstance(value, str):
        raise wrong(where, "a text", value)


def anything(value: Any, where: str) -> None:
    """Accept any value."""


def optional(shape: Shape) -> Shape:
    """Make a shape that accepts null too."""

    def check(value: Any, where: str) -> None:
        """Check anything but null."""
        if value is not None:
            shape(value, where)

    return check


def list_of(shape: Shape, length: int | None = None, most: int | None = None) -> Shape:
    """Make the shape of a list, of exactly `length` or at most `most` values."""

    def check(value: Any, where: str) -> None:
        """Check the list, then its values."""
        if not isinstance(value, list):
            raise wrong(where, "a list", value)
        if length not in (None, len(value)):
            raise ServerError(f"{where}: {len(value)} values instead of {length}")
        if most is not None and len(value) > most:
            raise ServerError(f"{where}: {len(value)} values, but at most {most} were asked for")
        for number, one in enumerate(value):
            shape(one, f"{where}[{number}]")

    return check


def fields(shapes: Mapping[str, Shape]) -> Shape:
    """Make the shape of an object with these fields, among others; a missing field counts as null."""

    def check(value: Any, where: str) -> None:
        """Check the object, then its fields."""
        if not isinstance(value, dict):
            raise wrong(where, "an object", value)
        for name, shape in shapes.items():
            shape(value.get(name), f"{where}.{name}")

    return check


def table(value: Any, where: str) -> None:
    """Check for the table of a position: token ids as text, each with its log-probability."""
    if not isinstance(value, dict):
        raise wrong(where, "a table of tokens", value)
    for key, entry in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 11 and int(key) < LARGEST):
            raise wrong(where, "a token id", key)
        if not isinstance(entry, dict):
            raise wrong(f"{where}[{key}]", "an object", entry)
        log_prob(entry.get("logprob"), f"{where}[{key}].logprob")


def wrong(where: str, due: str, value: Any) -> ServerError:
    """The error for a value of another shape; its text is cut to the beginning."""
    shown = repr(value)[:40] if isinstance(value, int | float | str | None) else type(value).__name__
    return ServerError(f"an answer that is not of vLLM's form: {where} is {shown}, not {due}")


COUNT, TOKEN_ID = integer(2**53, "an integer of at least 0"), integer(LARGEST, "a token id")
MODELS = fields(
    {
        "data": list_of(
            fields({"id": text, "root": optional(text), "parent": optional(text), "max_model_len": optional(COUNT)})
        )
    }
)
"""An answer with the list of models."""
TOKENS = fields({"tokens": list_of(TOKEN_ID)})
"""An answer with the tokens of a text."""
SCORED = fields({"choices": list_of(fields({"prompt_logprobs": optional(list_of(anything))}), length=1)})
"""An answer of `/v1/completions` with the tables of a prompt."""
REST = fields({"prompt_logprobs": list_of(anything)})
"""An answer of `/inference/v1/generate` with the tables of the tokens that were not cached."""
TABLES = list_of(table)
"""The tables of a response's tokens; those of cached tokens may hold anything."""
CACHED = fields({"usage": fields({"prompt_tokens_details": fields({"cached_tokens": COUNT})})})
"""An answer that says how many tokens of a prompt were cached."""


def completion(most: int | None, vocabulary: int | None) -> Shape:
    """Make the shape of an answer with one response: its tokens and their log-probabilities."""

    def known(value: Any, where: str) -> None:
        """Check for a token id of the student's vocabulary."""
        TOKEN_ID(value, where)
        if vocabulary is not None and value >= vocabulary:
            raise ServerError(f"{where}: token {value}, but the model has {vocabulary}")

    one = {"token_ids": list_of(known, most=most), "logprobs": fields({"token_logprobs": list_of(log_prob)})}
    return fields({"choices": list_of(fields(one), length=1)})
