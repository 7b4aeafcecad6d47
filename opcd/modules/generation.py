"""Sampling responses from a model with transformers' `generate`."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, GenerationConfig, PreTrainedModel

from opcd.modules.decoding import CACHE, Told, decode
from opcd.modules.packed_linear import packed_linears
from opcd.modules.trajectories import first_sequence

OURS = (
    *("max_new_tokens", "max_length", "do_sample", "temperature", "top_p", "top_k"),
    *("eos_token_id", "pad_token_id", "num_return_sequences", "return_dict_in_generate"),
)
"""Settings that Sampling has of its own, or that would change what comes back."""


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
    """More settings of transformers' GenerationConfig, such as {min_p: 0.05, repetition_penalty: 1.1}."""

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
        for name in self.options:
            if name in OURS or not hasattr(GenerationConfig(), name):
                why = "is set elsewhere" if name in OURS else "is no setting of transformers' GenerationConfig"
                raise ValueError(f"sampling.options: {name} {why}; remove it")

    def generation_config(self, eos_ids: set[int], pad_id: int) -> GenerationConfig:
        """The same in transformers' words; what a model's own generation config says does not come in."""
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
        own_precision(model, keep_casts=True) as dtype,
        packed_linears(model, dtype, sampling.max_new_tokens),
        _one_product_of_head(model),
    ):
        output = model.generate(  # type: ignore[operator]
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
