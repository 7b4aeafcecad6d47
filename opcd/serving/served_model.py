"""One model of a vLLM server, and its log-probabilities of the tokens of a prompt.

`POST /v1/completions` with a prompt of token ids and `prompt_logprobs: k` gives, for every token of the prompt but the
first, a table of the k likeliest tokens of its position and of the token itself. vLLM computes all of the prompt.
`POST /inference/v1/generate` (`--enable-scale-out`) uses the server's prefix cache, and gives tables of the tokens that
were not cached. With `--enable-prompt-tokens-details` an answer says how many tokens were cached.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opcd.serving import response_shapes as shapes
from opcd.serving.client import SHOWN, Server, ServerError, Shortcut

MODELS, TOKENIZE, COMPLETIONS, GENERATE = "/v1/models", "/tokenize", "/v1/completions", "/inference/v1/generate"
PROBE = "The 7 harbour masters of Quillhaven: naïve, 漢字, x += 1;\n\n\tdone.  Ferries leave at 08:45 (daily)!"
"""A text that different tokenizers split differently."""
START = 10.0
"""Seconds of retries when a run starts and the server does not answer; later the server's patience applies."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and of the response that follows it."""
Values = tuple[Tensor, Tensor]
"""Token ids and their log-probabilities, [R, k] each or, with k = 0, [R]."""


@dataclass(frozen=True)
class Card:
    """A server's entry about a model."""

    root: str | None
    """Folder or hub id of its weights."""
    window: int | None
    """Most tokens of a prompt and its response; None: the server does not say."""


def find(server: Server, name: str, patience: float | None = None) -> Card:
    """Find a model in the server's list; ServerError where it is not there, or the server does not answer."""
    answer = server.get(MODELS, patience)
    try:
        shapes.MODELS(answer, "answer")
    except ServerError as error:
        raise ServerError(f"{server.base_url}{MODELS} lists no models: {error}") from error
    cards = {card["id"]: card for card in answer["data"]}
    if name not in cards:
        raise ServerError(f"{server.base_url} serves no model {name}, but {', '.join(cards)[:SHOWN] or 'none'}")
    card = cards[name]
    base = cards.get(card.get("parent"), {})  # an adapter's window is its base's
    return Card(card.get("root"), card.get("max_model_len") or base.get("max_model_len"))


class ServedModel:
    """A model behind a server. Call `connect` first.

    Args:
        server: the server.
        name: the model's name in the server's list.

    Attributes:
        tells_cached: whether requests use the server's prefix cache; `connect` finds out whether they can.
    """

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self._card: Card | None = None
        self._called: str | None = None
        self.tells_cached = False

    @property
    def window(self) -> int | None:
        """Most tokens of a request's prompt; None: the server does not say."""
        return None if self._card is None or self._card.window is None else self._card.window - 1  # it generates one

    def connect(self, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
        """Find the model, and check that its tokenizer is this one and that it gives k tokens a position.

        Also find out whether contexts can come from the server's prefix cache: it needs the route, and must say how
        many tokens were cached.

        Raises:
            ServerError: the model is not there, or a check fails.
        """
        self._card = find(self.server, self.name, START)
        ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        compared = self._same_tokens(ids)
        ((answer, _),) = self._ask([(ids[:1], ids[1:])], k)
        self._called = answer.get("model")
        if not compared:
            _check_decoded(answer, ids, tokenizer)
        self.tells_cached = self._asks_for_the_rest(ids[:2], k)  # shorter than a block: never cached
        hint = "can come" if self.tells_cached else "cannot come (--enable-scale-out --enable-prompt-tokens-details)"
        rank_zero_info(f"{self.server.base_url}: contexts {hint} from the server's prefix cache")

    def log_probs(self, rows: Sequence[Row], k: int) -> list[Values]:
        """Get token ids and their log-probabilities at each token of each response, [R, k] x2.

        With k = 0 those of the response's own tokens, [R] x2. The temperature is 1.

        Raises:
            ServerError: the server fails, its answer is invalid, or the model is not the one that `connect` has found.
        """
        answers = self._ask(rows, k)
        found = find(self.server, self.name)  # after the requests, so that the model that has answered is checked
        if found != self._card:
            raise ServerError(f"{self.server.base_url} serves another {self.name} now: {found}; it was {self._card}")
        return [values for _, values in answers]

    def _same_tokens(self, ids: list[int]) -> bool:
        """Compare the probe's ids with the server's; False where the server does not give them."""
        body = {"model": self.name, "prompt": PROBE, "add_special_tokens": False}
        try:
            (served,) = self.server.post(TOKENIZE, [body], lambda answer, _: answer)
        except ServerError as error:
            if error.status not in (404, 405, 501):
                raise
            return False
        try:
            shapes.TOKENS(served, "answer")
        except ServerError:
            return False
        served = served["tokens"]
        if served != ids:
            raise ServerError(
                f"{self.name} has another tokenizer than model.student: it splits a probe into {served[:8]}..., the "
                f"student's into {ids[:8]}...; teacher and student must be of one family"
            )
        return True

    def _asks_for_the_rest(self, ids: list[int], k: int) -> bool:
        try:
            self.server.post(GENERATE, [self._rest(ids, k)], lambda answer, _: _cached_tokens(answer), patience=0)
        except ServerError:
            return False
        return True

    def _ask(self, rows: Sequence[Row], k: int) -> list[tuple[Any, Values]]:
        """The answer to each row, and the values in it."""
        whole = [
            {"model": self.name, "prompt": prompt + response, "prompt_logprobs": k, "max_tokens": 1, "temperature": 0.0}
            for prompt, response in rows
        ]
        shortcut = None
        if self.tells_cached:
            rest = [self._rest(prompt + response, k) for prompt, response in rows]
            shortcut = Shortcut(GENERATE, rest, self._reader(GENERATE, rows, k, _read_rest))
        try:
            return self.server.post(COMPLETIONS, whole, self._reader(COMPLETIONS, rows, k, _read_whole), shortcut)
        except ServerError as error:
            hint = f"; start the server with --max-logprobs {k}" if "max allowed" in str(error) else ""
            raise ServerError(f"{error}{hint}", error.status) from error

    def _rest(self, ids: list[int], k: int) -> dict[str, Any]:
        """The body of a request that uses the server's prefix cache."""
        cache = {"skip_reading_prefix_cache": False, "detokenize": False}
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, **cache}
        return {"model": self.name, "token_ids": ids, "sampling_params": sampling}

    def _reader(
        self, path: str, rows: Sequence[Row], k: int, values_of: Callable[[Any, list[int], list[int], int], Values]
    ) -> Callable[[Any, int], tuple[Any, Values]]:
        where = self.server.base_url + path

        def read(answer: Any, number: int) -> tuple[Any, Values]:
            """Read the values of a row, and check which model has answered."""
            try:
                values = values_of(answer, *rows[number], k)
                called = answer.get("model")
            except ServerError as error:
                raise ServerError(f"{where}: {error}") from error
            if self._called is not None and called != self._called:
                raise ServerError(f"{where}: answered by {called}; it was {self._called} when the run started")
            return answer, values

        return read


def _check_decoded(answer: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the texts of the probe's tokens at the server with the tokenizer's, where they are plain ASCII."""
    for token, table in list(zip(ids, answer["choices"][0]["prompt_logprobs"], strict=True))[1:]:
        ours, theirs = str(tokenizer.decode([token])), str((table or {}).get(str(token), {}).get("decoded_token"))
        if ours.isascii() and ours.strip() != theirs.strip():
            raise ServerError(
                f"another tokenizer than model.student's: token {token} is {theirs!r} there, {ours!r} here"
            )


def _read_whole(answer: Any, prompt: list[int], response: list[int], k: int) -> Values:
    """Read the values at a response's tokens from an answer of `/v1/completions`, which has a table for each token.

    Raises:
        ServerError: a table is missing, lacks tokens, or does not hold log-probabilities.
    """
    shapes.SCORED(answer, "answer")
    tables = answer["choices"][0].get("prompt_logprobs")
    if tables is None:
        raise ServerError("its answer has no prompt_logprobs; vLLM's has")
    if len(tables) != len(prompt) + len(response):
        raise ServerError(f"{len(tables)} positions for a prompt of {len(prompt) + len(response)} tokens")
    return _values(tables[len(prompt) :], response, k)


def _read_rest(answer: Any, prompt: list[int], response: list[int], k: int) -> Values:
    """Read the same from an answer of `/inference/v1/generate`, where a beginning of the prompt may have been cached.

    For cached tokens, one engine of vLLM gives no tables, and another one gives tables of uninitialized memory.

    Raises:
        ServerError: as in `_read_whole`; or tokens of the response were cached too.
    """
    cached = _cached_tokens(answer)
    shapes.REST(answer, "answer")
    tables = answer["prompt_logprobs"]
    # A token's table is computed from the token before it: the last token of the prompt must not be cached.
    if cached >= len(prompt) or len(tables) <= len(response):
        raise ServerError(
            f"{cached} of {len(prompt)} + {len(response)} tokens came from its cache, without log-probabilities"
        )
    return _values(tables[-len(response) :], response, k)


def _cached_tokens(answer: Any) -> int:
    """The number of prompt tokens that came from the server's cache; ServerError where the answer does not say."""
    shapes.CACHED(answer, "answer")
    return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])


def _values(tables: list[Any], response: list[int], k: int) -> Values:
    shapes.TABLES(tables, "prompt_logprobs")
    pairs = [_at(*one, k) for one in zip(tables, response, strict=True)]
    tokens, log_probs = (torch.tensor([[pair[n] for pair in row] for row in pairs]) for n in (0, 1))
    if k and float(log_probs.logsumexp(-1).max()) > shapes.ROUNDING:
        raise ServerError("the probabilities of a position sum to more than 1")
    return (tokens, log_probs) if k else (tokens[:, 0], log_probs[:, 0])


def _at(tokens: dict[str, Any], token: int, k: int) -> list[tuple[int, float]]:
    """The k likeliest tokens of a position, or with k = 0 the token that is there."""
    said = {int(key): float(entry["logprob"]) for key, entry in tokens.items()}
    if token not in said:
        raise ServerError(f"a position lacks the token that was sent there ({token})")
    if len(said) < k:
        raise ServerError(f"{len(said)} tokens at a position where {k} were asked for")
    return heapq.nlargest(k, said.items(), key=lambda pair: pair[1]) if k else [(token, said[token])]
