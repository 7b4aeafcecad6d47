"""Rows packed behind a prefix on an NVIDIA GPU: two passes of FlashAttention, merged by the logarithms of their sums.

Each row attends to itself (causal), and all rows together to the prefix (no mask). With l the logarithm of the sum of
a query's weights in either pass, sigmoid(l_own - l_prefix) is the share of its own row in the softmax over both. There
is no mask of all pairs, nothing is computed between rows, and nothing is compiled. In a layer with a sliding window,
each row attends to the last tokens of the prefix and to itself in one pass.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from opcd.accel import Accelerator, Pair

NAME = "opcd_flash_rows"
"""The name of the attention in transformers."""
SERVED = ("sdpa", "flash_attention_2", "flash_attention_3")
"""The attentions that it replaces: causal, without anything added to the scores."""
TYPES = (torch.bfloat16, torch.float16)
LARGEST_HEAD = 256
CAPABILITY = (8, 0)
"""What FlashAttention's kernels need of a GPU."""


class CUDAAccelerator(Accelerator):
    """Its own attention of packed rows, where FlashAttention's kernel of torch can run."""

    def packs_rows(self, model: PreTrainedModel) -> bool:
        """Whether the kernel serves the model: its attention and head size, the type that it computes in, the GPU."""
        return fits_kernel(model) and _can_run(model)

    def packed_attention(
        self, model: PreTrainedModel, layers: list[Pair], lengths: list[int]
    ) -> AbstractContextManager[None]:
        """See `flash_rows`."""
        return flash_rows(model, layers, lengths)


def fits_kernel(model: PreTrainedModel) -> bool:
    """Whether the model's attention and head size are those of the kernel.

    DeepSeek-V3's cache holds compressed states, and models that do not look up their attention by name keep it.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)  # a recurrent model has none
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return (
        config._attn_implementation in SERVED
        and model._supports_attention_backend
        and not any(hasattr(module, "expand_kv") for module in model.modules())
        and 0 < size <= LARGEST_HEAD
        and size % 8 == 0
    )


def _can_run(model: PreTrainedModel) -> bool:
    """Whether the model computes in a type of FlashAttention, on a GPU that has its kernels."""
    device = model.device
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    return dtype in TYPES and torch.cuda.get_device_capability(device) >= CAPABILITY


@contextmanager
def flash_rows(model: PreTrainedModel, layers: list[Pair], lengths: list[int]) -> Iterator[None]:
    """Within the context, packed rows of `lengths` tokens attend to themselves and to the prefix in every layer.

    `layers` holds the prefix's keys and values, [1, groups, P, D] for each layer; without a window they are not copied.
    """
    config = model.config.get_text_config()
    AttentionInterface.register(NAME, partial(_attention, layers, _Rows(lengths, model.device)))
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


class _Rows:
    """Sequences that stand one after the other, and where each ends, as the kernel wants it.

    Made once a pass, and not once a layer: a copy to the GPU each.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = list(lengths), device
        self._behind: dict[int, _Rows] = {}

    @cached_property
    def ends(self) -> Tensor:
        """0 and the end of each sequence, int32."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)

    def behind(self, tokens: int) -> "_Rows":
        """The same sequences, with so many tokens before each."""
        if tokens not in self._behind:
            self._behind[tokens] = _Rows([tokens + length for length in self.lengths], self.device)
        return self._behind[tokens]

    @cached_property
    def joined(self) -> "_Rows":
        """All as one sequence."""
        return _Rows([sum(self.lengths)], self.device)


@torch.no_grad()
def _attention(
    layers: list[Pair],
    rows: _Rows,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [1, heads, T, D], keys and values [1, groups, T, D] -> [1, T, heads, D].

    Raises:
        ValueError: the model uses an argument that the kernel lacks; complete rows are then passed instead.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]:
        raise ValueError(f"its attention has {', '.join(unknown)}, which is not supported here; use attention: eager")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    queries, keys, values = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    shared_keys, shared_values = (x[0].transpose(0, 1).to(dtype) for x in layers[module.layer_idx])
    if more := len(keys) - len(queries):  # those of a Cartridge, before those of the prefix
        shared_keys, shared_values = torch.cat([keys[:more], shared_keys]), torch.cat([values[:more], shared_values])
        keys, values = keys[more:], values[more:]
    if sliding_window is None:
        return _merged(queries, (keys, values), (shared_keys, shared_values), rows, scaling)[None], None
    kept = min(len(shared_keys), sliding_window - 1)
    keys, values = _behind(keys, shared_keys, kept, rows), _behind(values, shared_values, kept, rows)
    result, _ = flash(queries, keys, values, rows, rows.behind(kept), True, scaling, sliding_window)
    return result[None], None


def _merged(queries: Tensor, own: Pair, prefix: Pair, rows: _Rows, scale: float | None) -> Tensor:
    """The attention of each row to itself and to the prefix, from a pass over either: [T, heads, D]."""
    whole = _Rows([len(prefix[0])], rows.device)
    of_rows, l_rows = flash(queries, own[0], own[1], rows, rows, True, scale)
    of_prefix, l_prefix = flash(queries, prefix[0], prefix[1], rows.joined, whole, False, scale)
    share = torch.sigmoid(l_rows - l_prefix).T[..., None]
    return torch.lerp(of_prefix.to(share.dtype), of_rows.to(share.dtype), share).to(queries.dtype)


def _behind(own: Tensor, shared: Tensor, kept: int, rows: _Rows) -> Tensor:
    """The last `kept` of the shared before the tokens of each row."""
    last = shared[len(shared) - kept :]
    return torch.cat([part for row in own.split(rows.lengths) for part in (last, row)])


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: _Rows,
    keys: _Rows,
    causal: bool,
    scale: float | None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """FlashAttention of several sequences of queries, each to its own sequence of keys.

    Args:
        query: [T, heads, D].
        key: [S, groups, D]; heads is a multiple of groups, and neighbouring heads share keys.
        value: [S, groups, D].
        queries: the sequences of `query`.
        keys: as many of `key`.
        causal: the last query of a sequence sees its last key, the one before it one key less.
        scale: D ** -0.5 if None.
        window: how many keys a query sees at most, the last one included.

    Returns:
        [T, heads, D], and the logarithm of the sum of each query's weights, [heads, T] in float32.
    """
    found = torch.ops.aten._flash_attention_forward(
        *(query, key, value, queries.ends, keys.ends, max(queries.lengths), max(keys.lengths), 0.0, causal, False),
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
    )
    return found[0], found[1]
