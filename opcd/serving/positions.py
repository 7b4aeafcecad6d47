"""What vLLM's tables of log-probabilities say of a response's tokens."""

import heapq
from typing import Any

import torch
from torch import Tensor

from opcd.serving.client import ServerError
from opcd.serving.response_shapes import CACHED, ROUNDING, anything, fields, list_of, optional, table

SCORED = fields({"choices": list_of(fields({"prompt_logprobs": optional(list_of(anything))}), length=1)})
REST = fields({"prompt_logprobs": list_of(anything)})
TABLES = list_of(table)
"""Of the response's tokens alone: those of what was cached may hold anything."""

Values = tuple[Tensor, Tensor]
"""Token ids and their log-probabilities, [R, k] each or, k = 0, [R]."""


def read_whole(answer: Any, prompt: list[int], response: list[int], k: int) -> Values:
    """The values at a response's tokens in an answer of `/v1/completions`, which has a table for each token.

    Raises:
        ServerError: it has not, or not with k tokens, or what they say are no log-probabilities.
    """
    SCORED(answer, "answer")
    tables = answer["choices"][0].get("prompt_logprobs")
    if tables is None:
        raise ServerError("it gives no prompt_logprobs; vLLM does")
    if len(tables) != len(prompt) + len(response):
        raise ServerError(f"{len(tables)} positions for a prompt of {len(prompt) + len(response)} tokens")
    return _values(tables[len(prompt) :], response, k)


def read_rest(answer: Any, prompt: list[int], response: list[int], k: int) -> Values:
    """The same in an answer of `/inference/v1/generate`, whose prompt may have been cached but for its end.

    Of what was cached, one engine of vLLM gives no tables and another one fills them with whatever its memory held.

    Raises:
        ServerError: as `read_whole`; or tokens of the response were cached too.
    """
    cached = cached_tokens(answer)
    REST(answer, "answer")
    tables = answer["prompt_logprobs"]
    # A token's table comes out of the token before it, so that the prompt's last one must have been computed.
    if cached >= len(prompt) or len(tables) <= len(response):
        raise ServerError(f"{cached} of {len(prompt)} + {len(response)} tokens came from its cache, without values")
    return _values(tables[-len(response) :], response, k)


def cached_tokens(answer: Any) -> int:
    """How many tokens of a prompt a server has taken from its cache; ServerError where it does not tell."""
    CACHED(answer, "answer")
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def _values(tables: list[Any], response: list[int], k: int) -> Values:
    TABLES(tables, "prompt_logprobs")
    pairs = [_at(*one, k) for one in zip(tables, response, strict=True)]
    tokens, log_probs = (torch.tensor([[pair[n] for pair in row] for row in pairs]) for n in (0, 1))
    if k and float(log_probs.logsumexp(-1).max()) > ROUNDING:
        raise ServerError("the probabilities of a position sum to more than 1")
    return (tokens, log_probs) if k else (tokens[:, 0], log_probs[:, 0])


def _at(tokens: dict[str, Any], token: int, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens of a position, or with k = 0 the one that is there."""
    said = {int(key): float(entry["logprob"]) for key, entry in tokens.items()}
    if token not in said:
        raise ServerError(f"a position without the token that was sent there ({token})")
    if len(said) < k:
        raise ServerError(f"{len(said)} tokens at a position where {k} were asked for")
    return heapq.nlargest(k, said.items(), key=lambda pair: pair[1]) if k else [(token, said[token])]
