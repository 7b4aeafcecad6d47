"""A prefix of keys and values that all tokens of a model see: peft's CARTRIDGE (Cartridges, arXiv:2506.06266).

How it works: hooks around the decoder's pass put P keys and values before those of the tokens in every layer, as if P
more tokens had been read. The tokens' positions begin at P. A caller's masks, positions and caches know nothing of the
prefix: a mask gets P ones in front, and a cache holds the tokens alone. So all code that runs a model runs one with a
prefix, rows of different lengths and shared contexts included.
"""

from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from peft import CartridgeConfig, CartridgeEncoder

CACHE = "cache" if Version(transformers.__version__) >= Version("5.20") else "past_key_values"
"""The name of the argument with keys and values: vLLM still needs a transformers from before it was renamed."""
NAME = "cartridge"
"""The prefix's name in the decoder."""


@torch.no_grad()
def keys_and_values(model: PreTrainedModel, ids: Tensor, key: str) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of tokens [P] in each layer, [1, heads, P, D].

    Raises:
        UserError: the model keeps others than these, and can have no prefix; the message begins with `key`.
    """
    cache = DynamicCache(config=model.config.get_text_config())
    model.base_model(input_ids=ids[None].to(model.device), use_cache=True, **{CACHE: cache})
    plain = all(type(layer) is DynamicLayer and layer.is_initialized for layer in cache.layers)
    layers: list[Any] = [(layer.keys, layer.values) for layer in cache.layers] if plain else []  # type: ignore[union-attr]
    if model._is_stateful or len({x.shape for pair in layers for x in pair}) != 1:
        raise UserError(
            f"{key}: a Cartridge needs full attention with keys and values of one shape in every layer, and "
            f"{type(model).__name__} has others (a window, a state, compressed or wider ones); use Lora"
        )
    return layers


def attach_prefix(model: PreTrainedModel, config: "CartridgeConfig") -> "CartridgeEncoder":
    """Let all passes of a model see a prefix of these sizes, in float32 (float64 stays float64), with random values."""
    from peft import CartridgeEncoder

    prefix: CartridgeEncoder = CartridgeEncoder(config)  # type: ignore[no-untyped-call]
    prefix.to(model.device, torch.promote_types(model.dtype, torch.float32))
    decoder = model.base_model
    decoder.add_module(NAME, prefix)
    decoder.register_forward_pre_hook(_before, with_kwargs=True)
    decoder.register_forward_hook(_after)
    model.peft_config = {"default": config}  # type: ignore[dict-item]
    return prefix


def prefix_of(model: PreTrainedModel) -> "CartridgeEncoder | None":
    """The prefix of a model; None if it has none."""
    found: CartridgeEncoder | None = getattr(model.base_model, NAME, None)
    return found


def detach_prefix(model: PreTrainedModel) -> None:
    """Remove the prefix."""
    setattr(model.base_model, NAME, None)  # the hooks then change nothing
    del model.peft_config


def _before(decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    prefix: CartridgeEncoder | None = getattr(decoder, NAME)
    if prefix is None:
        return None
    cache = kwargs.get(CACHE)
    if cache is None and kwargs.get("use_cache") is not False:
        cache = DynamicCache()
    more: dict[str, Any] = {CACHE: _Behind(prefix, cache)}
    length = prefix.config.num_virtual_tokens
    if (positions := kwargs.get("position_ids")) is not None:
        more["position_ids"] = positions + length
    if (mask := kwargs.get("attention_mask")) is not None:
        more["attention_mask"] = _longer(mask, length)
    return args, kwargs | more


def _after(decoder: nn.Module, args: Any, output: Any) -> None:
    if isinstance(behind := output.get(CACHE), _Behind):
        output[CACHE] = behind.cache


def _longer(mask: Any, length: int) -> Tensor:
    """A mask of padding [B, T], or of queries and keys [B, 1, Q, T] (bool, or added to scores), with a seen prefix."""
    if not isinstance(mask, Tensor):
        raise ValueError(f"a Cartridge takes no mask of the type {type(mask).__name__}; set attention to sdpa or eager")
    seen = 0 if mask.dim() == 4 and mask.is_floating_point() else 1
    return torch.cat([mask.new_full((*mask.shape[:-1], length), seen), mask], -1)


class _Behind(Cache):
    """A pass's view of a cache, with the prefix before it.

    Attributes:
        cache: keys and values of the tokens alone; None keeps none.
    """

    def __init__(self, prefix: "CartridgeEncoder", cache: Cache | None) -> None:
        config, self.cache = prefix.config, cache
        heads: int = config.num_attention_heads
        # peft's layout: [P, layers * 2 * heads * D], a layer's keys before its values.
        pairs = prefix.weight.view(config.num_virtual_tokens, 2 * config.num_layers, heads, -1).permute(1, 2, 0, 3)
        layers = pairs.unflatten(0, (-1, 2))
        super().__init__(layers=[_Layer(pair, cache, number) for number, pair in enumerate(layers)])


class _Layer(DynamicLayer):
    """One layer of it; `pair` holds the prefix's keys and values, [2, heads, P, D]."""

    def __init__(self, pair: Tensor, cache: Cache | None, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.pair, self.cache, self.number = pair, cache, number

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep those of new tokens [B, heads, t, D]; return all that the tokens see."""
        if self.cache is not None:
            key_states, value_states = self.cache.update(key_states, value_states, self.number, *args, **kwargs)
        keys, values = (
            torch.cat([first.to(own.dtype).expand(len(own), -1, -1, -1), own], -2)
            for first, own in zip(self.pair, (key_states, value_states), strict=True)
        )
        return keys, values

    def get_seq_length(self) -> int:
        """How many tokens a new one follows."""
        return self.pair.shape[-2] + (self.cache.get_seq_length(self.number) if self.cache is not None else 0)
