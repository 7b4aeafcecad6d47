"""Sampling responses from a model with transformers' `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from opcd.accel import accelerator
from opcd.modules.lm.decoding import CACHE, Told, decode
from opcd.modules.trajectories import first_sequence
from opcd.runtime.did_you_mean import or_all

Bound = tuple[type, float, float]
"""Of an option: its type, and the range that it lies in, both ends included."""
DRAWING: dict[str, Bound] = {
    "min_p": (float, 0.0, 1.0),
    "typical_p": (float, 1e-6, 1.0),
    "top_h": (float, 1e-6, 1.0),
    "epsilon_cutoff": (float, 0.0, 0.999),
    "eta_cutoff": (float, 0.0, 0.999),
}
"""Options that choose among the tokens of a draw, without effect on greedy answers."""
OPTIONS: dict[str, Bound] = DRAWING | {
    "repetition_penalty": (float, 0.01, 100.0),
    "no_repeat_ngram_size": (int, 1, float("inf")),
    "min_new_tokens": (int, 0, float("inf")),
}
"""Settings of transformers' GenerationConfig that `Sampling.options` takes: those that one can check without a model,
and that leave a response one sequence of tokens which a loop of its own (`opcd.modules.lm.decoding`) writes."""
TEMPERATURES = (1e-3, 1e3)
"""Below, logits overflow; above, all tokens are the same."""


@dataclass
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 128
    """Most tokens of a response, its end-of-sequence token included."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 takes the likeliest token each time (greedy)."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens that holds this share of the mass; 1 keeps all."""
    top_k: int = 0
    """Sample among this many likeliest tokens; 0 keeps all."""
    options: dict[str, Any] = field(default_factory=dict)
    """More settings, as in transformers' GenerationConfig: min_p, typical_p, top_h, epsilon_cutoff, eta_cutoff,
    repetition_penalty, no_repeat_ngram_size, min_new_tokens."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling wants temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got temperature={self.temperature}, "
                f"top_k={self.top_k}, top_p={self.top_p}"
            )
        if self.temperature == 0 and (self.top_k > 0 or self.top_p < 1):
            raise ValueError("top_k and top_p have no effect at temperature 0 (greedy); remove them")
        if self.temperature != 0 and not TEMPERATURES[0] <= self.temperature <= TEMPERATURES[1]:
            raise ValueError(
                f"temperature must be 0 (greedy) or between {TEMPERATURES[0]:g} and {TEMPERATURES[1]:g}, "
                f"got {self.temperature}"
            )
        for name, value in self.options.items():
            self._check_option(name, value)

    def _check_option(self, name: str, value: object) -> None:
        if name not in OPTIONS:
            raise ValueError(f"sampling.options: {name} is no option of sampling{or_all(name, OPTIONS)}")
        kind, low, high = OPTIONS[name]
        if kind is int:
            high = self.max_new_tokens
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (kind is float and isinstance(value, float))) or not low <= cast(float, value) <= high:
            number = "a whole number" if kind is int else "a number"
            raise ValueError(f"sampling.options: {name} must be {number} from {low:g} to {high:g}, got {value!r}")
        if self.temperature == 0 and name in DRAWING:
            raise ValueError(f"sampling.options: {name} has no effect at temperature 0 (greedy); remove it")

    @property
    def is_cut(self) -> bool:
        """Whether tokens are drawn from another distribution than the softmax at this temperature."""
        return self.top_p < 1 or self.top_k > 0 or bool(self.options)

    def generation_config(self, eos_ids: set[int], pad_id: int) -> GenerationConfig:
        """The same in transformers' words. `no_settings_of_the_model` keeps a model's own settings out."""
        drawn: dict[str, Any] = {"do_sample": False} | self.options
        if self.temperature > 0:
            drawn |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=sorted(eos_ids), pad_token_id=pad_id, **drawn
        )


@dataclass
class EncodedPrefix:
    """Token ids that come first, with their keys and values."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]
    """A pair [1, heads, P, D] a layer."""

    @property
    def bytes(self) -> int:
        """The size of the keys and values."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)


def joined_cache(prefixes: list[EncodedPrefix]) -> DynamicCache:
    """A cache of a row a prefix, shorter ones padded on the left, that can grow; what is kept is never written."""
    longest = max(len(prefix.ids) for prefix in prefixes)
    cache = DynamicCache()
    for number, layers in enumerate(zip(*(prefix.layers for prefix in prefixes), strict=True)):
        padded = [[pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pair] for pair in layers]
        keys, values = (torch.cat(rows) for rows in zip(*padded, strict=True))
        cache.update(keys, values, number)
    return cache


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: list[Tensor],
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    prefixes: list[EncodedPrefix] | None = None,
    told: Told | None = None,
) -> list[Tensor]:
    """One response a prompt: B tensors [P] of token ids -> B tensors [R], 1 <= R <= max_new_tokens.

    `prefixes` are the keys and values of the ids that each prompt begins with; they are not computed again.
    `told` hears of every token of the responses when it is written.

    Each response ends with its first end-of-sequence token or at the limit. Draws come from torch's default generator.
    """
    shared = [len(prefix.ids) for prefix in prefixes] if prefixes else [0] * len(prompts)
    begin, begin_mask = left_padded([prompt[:n] for prompt, n in zip(prompts, shared, strict=True)], pad_id)
    rest, rest_mask = left_padded([prompt[n:] for prompt, n in zip(prompts, shared, strict=True)], pad_id)
    ids = torch.cat([begin, rest], dim=1)
    with (
        eval_mode(model),
        no_settings_of_the_model(model),
        own_precision(model, keep_casts=True) as dtype,
        accelerator(model.device).fast_linears(model, dtype, sampling.max_new_tokens),
        _one_product_of_head(model),
    ):
        output = cast(Any, type(model)).generate(  # a folder can put a function of its own on the instance
            model,
            custom_generate=decode,
            input_ids=ids.to(model.device),
            attention_mask=torch.cat([begin_mask, rest_mask], dim=1).to(model.device),
            generation_config=sampling.generation_config(eos_ids, pad_id),
            told=told,
            **({CACHE: joined_cache(prefixes)} if prefixes else {}),
        )
    return [first_sequence(row, eos_ids) for row in output[:, ids.shape[1] :]]


def left_padded(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows of token ids, padded on the left, and a mask, 1 = a token of the row: [B, T] int64 each."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    longest = ids.shape[1]
    return ids, torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])


@contextmanager
def own_precision(model: PreTrainedModel, keep_casts: bool = False) -> Iterator[torch.dtype]:
    """Low-precision weights compute as they are (autocast would only add casts); float32 ones follow the trainer's.

    Gives the type that the model's products then have.

    `keep_casts` casts each weight once, not at every pass, and takes memory for it. The casts are dropped at the end:
    made without gradient here, they would cut the gradient of a training pass in the same autocast region.
    """
    device = model.device.type
    enabled = torch.is_autocast_enabled(device) and model.dtype == torch.float32
    autocast = torch.get_autocast_dtype(device)
    with torch.autocast(device, autocast, enabled=enabled, cache_enabled=keep_casts):
        try:
            yield autocast if enabled else model.dtype
        finally:
            torch.clear_autocast_cache()


@contextmanager
def no_settings_of_the_model(model: PreTrainedModel) -> Iterator[None]:
    """Put an empty generation config in the place of the model's.

    `generate` takes from there every setting that it is not given: a repetition penalty, suppressed tokens, beams.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def _one_product_of_head(model: PreTrainedModel) -> Iterator[None]:
    """The head reads whole tensors: with a slice of the prompts' states, torch copies a frozen head once a row."""
    with model.get_output_embeddings().register_forward_pre_hook(lambda head, states: states[0].contiguous()):
        yield


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode (no dropout, no gradient checkpointing, which switches the cache off), then each module as before."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def computing_dtype(precision: object, own: torch.dtype) -> torch.dtype:
    """The type that a trainer of this precision computes in, with weights of type `own`."""
    return torch.bfloat16 if str(precision).startswith("bf16") else own
