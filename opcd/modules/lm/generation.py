"""Sampling responses from a model: transformers' `generate`, with a decoding loop of our own.

How the loop works: `generate` prepares the cache, logits processors and stopping criteria as usual. A row that has
ended leaves the batch. Each draw takes one random number per row, where `torch.multinomial` takes one per token of the
vocabulary: on a CPU 8 ms for 8 rows of 49,152 (docs/log.md). Keys and values of a new token are written in place, where
transformers copies all of them for every token.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from opcd.accel import accelerator
from opcd.accel.shared_context import behind_one_prefix
from opcd.models.key_value_prefix import CACHE, prefix_of
from opcd.modules.lm.layer_kinds import sliding_window
from opcd.modules.lm.rows_at_a_time import at_a_time
from opcd.modules.trajectories import first_sequence
from opcd.runtime.did_you_mean import or_all
from opcd.runtime.interruption import check

Told = Callable[[Tensor, Tensor], None]
"""A callback for each new token: the numbers of the rows that continue [r], and a token for each [r]."""

Bound = tuple[type, float, float]
"""The type of an option and its range, both ends included."""
DRAWING: dict[str, Bound] = {
    "min_p": (float, 0.0, 1.0),
    "typical_p": (float, 1e-6, 1.0),
    "top_h": (float, 1e-6, 1.0),
    "epsilon_cutoff": (float, 0.0, 0.999),
    "eta_cutoff": (float, 0.0, 0.999),
}
"""Options that filter the tokens of a draw; they have no effect on greedy answers."""
OPTIONS: dict[str, Bound] = DRAWING | {
    "repetition_penalty": (float, 0.01, 100.0),
    "no_repeat_ngram_size": (int, 1, float("inf")),
    "min_new_tokens": (int, 0, float("inf")),
}
"""Settings of transformers' GenerationConfig that `Sampling.options` takes: those that can be checked without a model,
and that leave a response one sequence of tokens, which `decode` can write."""
TEMPERATURES = (1e-3, 1e3)
"""Below, logits overflow; above, all tokens are equally likely."""


@dataclass
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 128
    """Most tokens of a response, including its end-of-sequence token."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 is greedy: always the likeliest token."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with at least this probability mass; 1 keeps all tokens."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 keeps all tokens."""
    options: dict[str, Any] = field(default_factory=dict)
    """More settings, as in transformers' GenerationConfig: min_p, typical_p, top_h, epsilon_cutoff, eta_cutoff,
    repetition_penalty, no_repeat_ngram_size, min_new_tokens."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling needs temperature >= 0, top_k >= 0 and 0 < top_p <= 1, got temperature={self.temperature}, "
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
            raise ValueError(f"sampling.options: {name} is not a sampling option{or_all(name, OPTIONS)}")
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
        """The same settings for transformers. `no_settings_of_the_model` keeps out a model's own settings."""
        drawn: dict[str, Any] = {"do_sample": False} | self.options
        if self.temperature > 0:
            drawn |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, eos_token_id=sorted(eos_ids), pad_token_id=pad_id, **drawn
        )


@dataclass
class EncodedPrefix:
    """The token ids of a prefix with their keys and values."""

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]
    """Keys and values [1, heads, P, D] of each layer."""

    @property
    def bytes(self) -> int:
        """The size of the keys and values."""
        return sum(x.numel() * x.element_size() for pair in self.layers for x in pair)


def joined_cache(prefixes: list[EncodedPrefix]) -> DynamicCache:
    """A cache with one row per prefix, padded on the left, that can grow; the prefixes themselves are not changed."""
    longest = max(len(prefix.ids) for prefix in prefixes)
    cache = DynamicCache()
    for number, layers in enumerate(zip(*(prefix.layers for prefix in prefixes), strict=True)):
        padded = [[pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pair] for pair in layers]
        keys, values = (torch.cat(rows) for rows in zip(*padded, strict=True))
        cache.update(keys, values, number)
    return cache


def one_prefix(model: PreTrainedModel, prefixes: list[EncodedPrefix] | None) -> EncodedPrefix | None:
    """The prefix that several rows have in common and that the model can read once for all; None: there is none."""
    if prefixes is None or len(prefixes) < 2 or any(prefix.ids != prefixes[0].ids for prefix in prefixes):
        return None
    serves = accelerator(model.device).packs_rows(model) and sliding_window(model) is None and prefix_of(model) is None
    return prefixes[0] if serves else None


def shared_cache(prefix: EncodedPrefix, rows: int) -> DynamicCache:
    """A cache for the own tokens of rows behind one prefix, which `behind_one_prefix` reads."""
    cache = DynamicCache()
    for pair in prefix.layers:
        keys, values = (x[:, :, :0].expand(rows, -1, -1, -1) for x in pair)
        cache.layers.append(RoomyLayer(keys, values, before=len(prefix.ids)))
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
    rows_at_a_time: int | None = None,
) -> list[Tensor]:
    """Generate one response per prompt: B tensors [P] of token ids -> B tensors [R], 1 <= R <= max_new_tokens.

    Each response ends with its first end-of-sequence token or at the limit. Draws come from torch's default generator.

    Args:
        model: in any mode.
        prompts: B tensors [P] of token ids.
        sampling: how tokens are drawn.
        eos_ids: the end-of-sequence tokens.
        pad_id: fills shorter rows.
        prefixes: keys and values of the ids that each prompt begins with.
        told: called for each new token.
        rows_at_a_time: most rows that are generated side by side. None: as many as fit into a GPU's free memory, on
            other devices all.
    """
    common = one_prefix(model, prefixes)
    longest = max(map(len, prompts), default=0) + sampling.max_new_tokens - (len(common.ids) if common else 0)
    size = at_a_time(model, len(prompts), longest, rows_at_a_time)
    responses: list[Tensor] = []
    for first in range(0, len(prompts), max(1, size)):
        part = slice(first, first + size)
        of_part = None if told is None else _of_part(told, first)
        begun = None if prefixes is None else prefixes[part]
        responses += _generate(model, prompts[part], sampling, eos_ids, pad_id, begun, of_part)
    return responses


def _of_part(told: Told, first: int) -> Told:
    """The callback for rows that are counted from `first`."""
    return lambda rows, tokens: told(rows + first, tokens)


def _generate(
    model: PreTrainedModel,
    prompts: list[Tensor],
    sampling: Sampling,
    eos_ids: set[int],
    pad_id: int,
    prefixes: list[EncodedPrefix] | None,
    told: Told | None,
) -> list[Tensor]:
    """`generate` for rows that are generated side by side."""
    shared = [len(prefix.ids) for prefix in prefixes] if prefixes else [0] * len(prompts)
    begin, begin_mask = left_padded([prompt[:n] for prompt, n in zip(prompts, shared, strict=True)], pad_id)
    rest, rest_mask = left_padded([prompt[n:] for prompt, n in zip(prompts, shared, strict=True)], pad_id)
    ids = torch.cat([begin, rest], dim=1)
    common = one_prefix(model, prefixes)
    cache = {CACHE: shared_cache(common, len(prompts)) if common else joined_cache(prefixes)} if prefixes else {}
    with (
        eval_mode(model),
        no_settings_of_the_model(model),
        own_precision(model, keep_casts=True) as dtype,
        accelerator(model.device).fast_linears(model, dtype, sampling.max_new_tokens),
        # For a slice of the prompts' states, torch would copy a frozen head once per row.
        model.get_output_embeddings().register_forward_pre_hook(lambda _, states: states[0].contiguous()),
        behind_one_prefix(model, common.layers) if common else nullcontext(),
    ):
        output = cast(Any, type(model)).generate(  # a folder can put a function of its own on the instance
            model,
            custom_generate=decode,
            input_ids=ids.to(model.device),
            attention_mask=torch.cat([begin_mask, rest_mask], dim=1).to(model.device),
            generation_config=sampling.generation_config(eos_ids, pad_id),
            told=told,
            **cache,
        )
    return [first_sequence(row, eos_ids) for row in output[:, ids.shape[1] :]]


def left_padded(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids padded on the left, and their mask (1: a token of the row): [B, T] int64 each."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
    longest = ids.shape[1]
    return ids, torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])


def decode(
    model: Any,  # a PreTrainedModel: transformers types its methods as tensors or modules
    input_ids: Any,  # [B, T] int64
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    told: Told | None = None,
    **inputs: Any,
) -> Tensor:
    """The decoding loop for ``generate(custom_generate=decode)``: prompts [B, T] -> [B, T + R].

    A signal to stop is noticed between two tokens (`Interrupted`).
    With `synced_gpus` (FSDP), a rank that is done keeps running until every rank is; its results are not used.
    """
    longest = generation_config.max_length - input_ids.shape[1]
    written = input_ids.new_full((len(input_ids), longest), generation_config.pad_token_id)
    prompts, rows = input_ids, torch.arange(len(input_ids), device=input_ids.device)
    going, done, step = torch.ones_like(rows, dtype=torch.bool), False, 0
    processors = LogitsProcessorList(NoEndBefore.of(processor) for processor in logits_processor)
    outputs = model._prefill(input_ids, generation_config, inputs)
    give_room(outputs.get(CACHE))
    while True:
        inputs = model._update_model_kwargs_for_generation(outputs, inputs)
        scores = processors(input_ids, outputs.logits[:, -1].float())
        tokens = draw(scores) if generation_config.do_sample else scores.argmax(-1)
        check()
        input_ids = torch.cat([input_ids, tokens[:, None]], dim=1)
        if not done:
            written[rows, step] = tokens
            if told is not None:
                told(rows[going], tokens[going])
            going &= ~stopping_criteria(input_ids, None)
            step, done = step + 1, not bool(going.any())
            if not done and not bool(going.all()) and _can_leave(inputs, len(rows)):
                inputs[CACHE].batch_select_indices(going.nonzero().squeeze(1))
                inputs = {name: x[going] if isinstance(x, Tensor) else x for name, x in inputs.items()}
                rows, input_ids, going = rows[going], input_ids[going], going[going]
        if not model._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
            return torch.cat([prompts, written[:, :step]], dim=1)
        model_inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**model_inputs, return_dict=True)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, D] in a larger buffer, into which those of the next tokens are written.

    Attributes:
        before: tokens of a prefix that stands before them and is elsewhere.
    """

    MORE = 64
    """Free places, in tokens, after a copy."""

    def __init__(self, keys: Tensor, values: Tensor, before: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values, self.before = keys, values, before
        self._memory = [keys, values]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append those of new tokens [B, heads, t, D]; return all of them."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._appended(0, self.keys, key_states), self._appended(1, self.values, value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """How many tokens a new one follows."""
        return self.before + int(super().get_seq_length())

    def _appended(self, number: int, old: Tensor, new: Tensor) -> Tensor:
        memory, had, length = self._memory[number], old.shape[-2], old.shape[-2] + new.shape[-2]
        if memory.data_ptr() != old.data_ptr() or memory.shape[-2] < length:  # selecting rows has moved them
            memory = new.new_empty(*new.shape[:2], length + self.MORE, new.shape[-1])
            memory[..., :had, :] = old
            self._memory[number] = memory
        memory[..., had:length, :] = new
        return memory[..., :length, :]


def give_room(cache: Any) -> None:
    """Let the plain layers of a cache grow in place; layers with a window or a recurrent state stay as they are."""
    for number, layer in enumerate(cache.layers if isinstance(cache, DynamicCache) else ()):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[number] = RoomyLayer(layer.keys, layer.values)


def draw(scores: Tensor) -> Tensor:
    """Draw one token per row from softmax(scores), [B, V] -> [B] int64, by inversion of the cumulative distribution."""
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
    # right: the first token whose sum exceeds the point, which has a probability above zero
    return torch.searchsorted(cumulated, point, right=True).squeeze(1).clamp(max=scores.shape[-1] - 1)


def _can_leave(inputs: dict[str, Any], rows: int) -> bool:
    """Whether all inputs of the model have one entry per row, which a recurrent state does not have."""
    cache = inputs.get(CACHE)
    return (
        isinstance(cache, DynamicCache)
        # `is_linear` misses layers with both a state and keys and values (FalconH1's)
        and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        and all(len(value) == rows for value in inputs.values() if isinstance(value, Tensor))
    )


class NoEndBefore(LogitsProcessor):
    """Forbids end-of-sequence tokens before a length, prompt included; in place, transformers copies the scores."""

    def __init__(self, tokens: int, ends: Tensor) -> None:
        self.tokens, self.ends = tokens, ends

    @classmethod
    def of(cls, processor: LogitsProcessor) -> LogitsProcessor:
        """The replacement of transformers' own processors; other processors are returned as they are."""
        if type(processor) is MinLengthLogitsProcessor:
            return cls(processor.min_length, processor.eos_token_id)
        if type(processor) is MinNewTokensLengthLogitsProcessor:
            return cls(processor.prompt_length_to_skip + processor.min_new_tokens, processor.eos_token_id)
        return processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V], overwritten."""
        return scores.index_fill_(1, self.ends, -torch.inf) if input_ids.shape[1] < self.tokens else scores


@contextmanager
def own_precision(model: PreTrainedModel, keep_casts: bool = False) -> Iterator[torch.dtype]:
    """Run low-precision weights in their own type, without autocast; float32 weights follow the trainer's autocast.

    Yields the type of the model's matrix products.

    `keep_casts` casts each weight once, not in every pass, and needs memory for the copies. They are dropped at the
    end: made without gradient, they would cut the gradient of a training pass in the same autocast region.
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
    """Replace the model's generation config with an empty one.

    `generate` reads every setting from there that it is not given: a repetition penalty, suppressed tokens, beams.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def eval_mode(model: PreTrainedModel) -> Iterator[None]:
    """Use eval mode: no dropout, no gradient checkpointing, which disables the cache. Then restore each module."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def computing_dtype(precision: object, own: torch.dtype) -> torch.dtype:
    """The type that a trainer of this precision computes in, for weights of type `own`."""
    return torch.bfloat16 if str(precision).startswith("bf16") else own
