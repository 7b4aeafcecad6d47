"""One model of a vLLM server: what it is, and its log-probabilities of the tokens of a prompt.

`POST /v1/completions` with a prompt of token ids and `prompt_logprobs: k` gives, for every token of the prompt but the
first, a table of the k likeliest tokens of its position and of the token itself. For it vLLM computes the whole prompt.
`POST /inference/v1/generate` (`--enable-scale-out`) takes what the server has in its prefix cache, and gives tables of
the rest; how much that is, an answer tells with `--enable-prompt-tokens-details`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from opcd.serving import response_shapes as shapes
from opcd.serving.client import SHOWN, Server, ServerError, Shortcut
from opcd.serving.positions import Values, cached_tokens, read_rest, read_whole

MODELS, TOKENIZE, COMPLETIONS, GENERATE = "/v1/models", "/tokenize", "/v1/completions", "/inference/v1/generate"
PROBE = "The 7 harbour masters of Quillhaven: naïve, 漢字, x += 1;\n\n\tdone.  Ferries leave at 08:45 (daily)!"
"""A text that two tokenizers hardly cut alike."""
START = 10.0
"""Seconds for which a server that is not there is asked again when a run begins; later its patience counts."""

Row = tuple[list[int], list[int]]
"""Token ids of a prompt, and of the response that follows it."""


@dataclass(frozen=True)
class Card:
    """What a server says of a model."""

    root: str | None
    """Folder or hub id of its weights."""
    window: int | None
    """Most tokens of a prompt and what follows it; None where it is not said."""


def find(server: Server, name: str, patience: float | None = None) -> Card:
    """What a server says of a model; ServerError where it has none of that name, or is not there."""
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
    """A model behind a server; `connect` comes first.

    Args:
        server: where.
        name: as the server lists it.

    Attributes:
        tells_cached: whether prompts are asked for in the way that takes what the server has in its prefix cache;
            `connect` finds out.
    """

    def __init__(self, server: Server, name: str) -> None:
        self.server, self.name = server, name
        self._card: Card | None = None
        self._called: str | None = None
        self.tells_cached = False

    @property
    def window(self) -> int | None:
        """Most tokens of a request's prompt; None where the server does not say."""
        return None if self._card is None or self._card.window is None else self._card.window - 1  # it generates one

    def connect(self, tokenizer: PreTrainedTokenizerBase, k: int) -> None:
        """Find the model, and see that its token ids are the tokenizer's and that it gives k tokens a position.

        And whether contexts can come from the server's prefix cache: it has the route, and tells what was cached.

        Raises:
            ServerError: it is not there, or does not do so.
        """
        self._card = find(self.server, self.name, START)
        ids = list(tokenizer(PROBE, add_special_tokens=False)["input_ids"])
        by_text = self._tokenized(ids)
        ((answer, _),) = self._ask([(ids[:1], ids[1:])], k)
        self._called = answer.get("model")
        if not by_text:
            _check_decoded(answer, ids, tokenizer)
        self.tells_cached = self._asks_for_the_rest(ids[:2], k)  # less than a block, which is never cached
        hint = "can come" if self.tells_cached else "cannot come (--enable-scale-out --enable-prompt-tokens-details)"
        rank_zero_info(f"{self.server.base_url}: contexts {hint} from the server's prefix cache")

    def log_probs(self, rows: Sequence[Row], k: int) -> list[Values]:
        """Token ids and their log-probabilities at each token of each response, [R, k] x2.

        With k = 0 those of the response's own tokens, [R] x2. The model divides its logits by nothing.

        Raises:
            ServerError: they cannot be had, make no sense, or come from another model than `connect` has found.
        """
        answers = self._ask(rows, k)
        found = find(self.server, self.name)  # afterwards: whoever has answered is there now
        if found != self._card:
            raise ServerError(f"{self.server.base_url} serves another {self.name} now: {found}; it was {self._card}")
        return [values for _, values in answers]

    def _tokenized(self, ids: list[int]) -> bool:
        """Compare the probe's ids with the server's; False where it does not tell them."""
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
                f"{self.name} has another tokenizer than model.student: it cuts a probe into {_short(served)}, the "
                f"student's into {_short(ids)}; teacher and student must be of one family"
            )
        return True

    def _asks_for_the_rest(self, ids: list[int], k: int) -> bool:
        try:
            self.server.post(GENERATE, [self._rest(ids, k)], lambda answer, _: cached_tokens(answer), patience=0)
        except ServerError:
            return False
        return True

    def _ask(self, rows: Sequence[Row], k: int) -> list[tuple[Any, Values]]:
        """Each answer, and what is read out of it."""
        whole = [
            {"model": self.name, "prompt": prompt + response, "prompt_logprobs": k, "max_tokens": 1, "temperature": 0.0}
            for prompt, response in rows
        ]
        shortcut = self._shortcut(rows, k) if self.tells_cached else None
        try:
            return self.server.post(COMPLETIONS, whole, self._reader(COMPLETIONS, rows, k, read_whole), shortcut)
        except ServerError as error:
            hint = f"; start the server with --max-logprobs {k}" if "max allowed" in str(error) else ""
            raise ServerError(f"{error}{hint}", error.status) from error

    def _shortcut(self, rows: Sequence[Row], k: int) -> Shortcut[tuple[Any, Values]]:
        bodies = [self._rest(prompt + response, k) for prompt, response in rows]
        return Shortcut(GENERATE, bodies, self._reader(GENERATE, rows, k, read_rest))

    def _rest(self, ids: list[int], k: int) -> dict[str, Any]:
        """A request for values of what the server has not in its cache."""
        cache = {"skip_reading_prefix_cache": False, "detokenize": False}
        sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": k, **cache}
        return {"model": self.name, "token_ids": ids, "sampling_params": sampling}

    def _reader(
        self, path: str, rows: Sequence[Row], k: int, values_of: Callable[[Any, list[int], list[int], int], Values]
    ) -> Callable[[Any, int], tuple[Any, Values]]:
        where = self.server.base_url + path

        def read(answer: Any, number: int) -> tuple[Any, Values]:
            """The answer to a row's request, and its values."""
            try:
                values = values_of(answer, *rows[number], k)
                called = answer.get("model")
            except ServerError as error:
                raise ServerError(f"{where}: {error}") from error
            if self._called is not None and called != self._called:
                raise ServerError(f"{where}: answered by {called}; it was {self._called} when the run began")
            return answer, values

        return read


def _check_decoded(answer: Any, ids: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the texts that a server gives for the probe's tokens with the tokenizer's; those of plain ASCII."""
    for token, table in list(zip(ids, answer["choices"][0]["prompt_logprobs"], strict=True))[1:]:
        ours, theirs = str(tokenizer.decode([token])), str((table or {}).get(str(token), {}).get("decoded_token"))
        if ours.isascii() and ours.strip() != theirs.strip():
            raise ServerError(
                f"another tokenizer than model.student's: token {token} is {theirs!r} there, {ours!r} here"
            )


def _short(ids: list[int]) -> str:
    return f"{ids[:8]}..."
