"""The loop that writes token after token, for transformers' ``generate(custom_generate=decode)``.

How it works: `generate` prepares cache, logits processors and stopping criteria as ever. A row that has ended leaves
the batch, so that the others go on without it, and a token is drawn with one random number a row, where
`torch.multinomial` takes one a token of the vocabulary: on a CPU 8 ms for 8 rows of 49,152 (docs/log.md). The keys and
values of a token are written behind those of the others, where transformers copies all of them for every token.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from opcd.runtime.interruption import check

CACHE = "cache" if Version(transformers.__version__) >= Version("5.20") else "past_key_values"
"""What transformers calls the keys and values: vLLM still wants a release from before they were renamed."""

Told = Callable[[Tensor, Tensor], None]
"""Is told of tokens as they are written: numbers of the rows that go on [r], and a token for each [r]."""


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
    """Prompts [B, T] -> [B, T + R]: what `generate` returns for one sampled or greedy sequence a row.

    A signal that asks the run to end is noticed between two tokens (`Interrupted`).
    With `synced_gpus` (FSDP) a rank that is done runs on, its results unread, until every rank is.
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
                rows, input_ids, inputs = rows[going], input_ids[going], _selected(inputs, going)
                going = going[going]
        if not model._has_unfinished_sequences(done, synced_gpus, device=input_ids.device):
            return torch.cat([prompts, written[:, :step]], dim=1)
        model_inputs = model.prepare_inputs_for_generation(input_ids, next_sequence_length=1, **inputs)
        outputs = model(**model_inputs, return_dict=True)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, T, D] with room behind them, which those of the next tokens are written into."""

    MORE = 64
    """Tokens that there is room for after a copy."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._memory = [keys, values]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add those of new tokens [B, heads, t, D]; the result is all of them."""
        assert self.keys is not None and self.values is not None
        self.keys, self.values = self._behind(0, self.keys, key_states), self._behind(1, self.values, value_states)
        return self.keys, self.values

    def _behind(self, number: int, old: Tensor, new: Tensor) -> Tensor:
        memory, had, length = self._memory[number], old.shape[-2], old.shape[-2] + new.shape[-2]
        if memory.data_ptr() != old.data_ptr() or memory.shape[-2] < length:  # rows that were selected lie elsewhere
            memory = new.new_empty(*new.shape[:2], length + self.MORE, new.shape[-1])
            memory[..., :had, :] = old
            self._memory[number] = memory
        memory[..., had:length, :] = new
        return memory[..., :length, :]


def give_room(cache: Any) -> None:
    """Let the plain layers of a cache grow in place; those with a window or a state of their own stay."""
    for number, layer in enumerate(cache.layers if isinstance(cache, DynamicCache) else ()):
        if type(layer) is DynamicLayer and layer.keys is not None and layer.values is not None:
            cache.layers[number] = RoomyLayer(layer.keys, layer.values)


def draw(scores: Tensor) -> Tensor:
    """A token a row from softmax(scores): [B, V] -> [B] int64, by inversion of the cumulative distribution."""
    cumulated = scores.softmax(-1).cumsum(-1, dtype=torch.float64)
    point = torch.rand(len(scores), 1, dtype=torch.float64, device=scores.device) * cumulated[:, -1:]
    # right: the first token whose sum is beyond the point, which has a probability above zero
    return torch.searchsorted(cumulated, point, right=True).squeeze(1).clamp(max=scores.shape[-1] - 1)


def _can_leave(inputs: dict[str, Any], rows: int) -> bool:
    """Whether all that the model carries along is a row each: not so for a recurrent state."""
    cache = inputs.get(CACHE)
    tensors = [value for name, value in inputs.items() if isinstance(value, Tensor)]
    return (
        isinstance(cache, DynamicCache)
        # `is_linear` leaves out layers that keep both, a state and keys and values (FalconH1's)
        and not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers)
        and all(len(tensor) == rows for tensor in tensors)
    )


def _selected(inputs: dict[str, Any], going: Tensor) -> dict[str, Any]:
    """The same for the rows that go on."""
    inputs[CACHE].batch_select_indices(going.nonzero().squeeze(1))
    return {name: value[going] if isinstance(value, Tensor) else value for name, value in inputs.items()}


class NoEndBefore(LogitsProcessor):
    """No end-of-sequence token before so many tokens, prompt included: one column, where transformers copies all."""

    def __init__(self, tokens: int, ends: Tensor) -> None:
        self.tokens, self.ends = tokens, ends

    @classmethod
    def of(cls, processor: LogitsProcessor) -> LogitsProcessor:
        """The same as transformers' own; others as they are."""
        if type(processor) is MinLengthLogitsProcessor:
            return cls(processor.min_length, processor.eos_token_id)
        if type(processor) is MinNewTokensLengthLogitsProcessor:
            return cls(processor.prompt_length_to_skip + processor.min_new_tokens, processor.eos_token_id)
        return processor

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [B, V], overwritten."""
        return scores.index_fill_(1, self.ends, -torch.inf) if input_ids.shape[1] < self.tokens else scores
