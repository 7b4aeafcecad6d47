"""Attention of rows packed behind a prefix, without a mask of all pairs.

How it works: every row attends to itself (causal), and all queries together attend to the prefix (no mask). Each of the
two gives its result and the logarithm of the sum of its weights, l1 and l2. The attention over both is
own * sigmoid(l1 - l2) + far * sigmoid(l2 - l1). In a layer with a sliding window, each row gets copies of the last keys
of the prefix before its own instead, so one causal attention is enough.

On CUDA both are FlashAttention (arXiv:2205.14135), which torch brings: nothing is compiled. Its kernel takes bfloat16
and float16 on GPUs since Ampere, heads of up to 256 numbers, and no capped scores. Everything else is blocks of plain
products (`blockwise`), on any device. A device with a faster way replaces `attend` (`Accelerator.attend_packed`).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AttentionInterface, PreTrainedModel

Pair = tuple[Tensor, Tensor]
"""Keys and values, or a result and the logarithm of the sum of its weights."""

NAME = "opcd_packed_rows"
"""The name of this attention in transformers."""
REPLACED = {"sdpa", "eager", "flash_attention_2", "flash_attention_3"}
"""Attentions that compute the softmax over the same keys; another one may compute something else."""
FLASH_TYPES, FLASH_WIDTH, FLASH_GPU = (torch.bfloat16, torch.float16), 256, (8, 0)
"""Types and the widest head of the FlashAttention kernel, and the first GPU (compute capability) that has it."""
SCORES = 2**24
"""Attention scores of plain products at a time: 64 MiB in float32."""
MERGED = 2048
"""Queries that are merged at a time, in float32."""


@dataclass(frozen=True)
class Scoring:
    """How scores are made of queries and keys.

    Attributes:
        scale: factor of the products.
        softcap: scores become softcap * tanh(score / softcap); None: they stay.
        window: how many keys a query sees, its own included; None: all before it.
        sink: a score of each head [H] that takes part in the softmax and has no value (GPT-OSS); None: there is none.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None


@dataclass
class Packed:
    """The rows of a packed pass, and where they begin and end on a device.

    Attributes:
        lengths: tokens of each row.
    """

    lengths: list[int]
    _ends: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def ends(self, lengths: list[int], device: torch.device) -> Tensor:
        """0 and the sums of the first lengths, [rows + 1] int32; copied to the device once, not in every layer."""
        key = tuple(lengths)
        if key not in self._ends:
            sums = torch.tensor([0, *lengths]).cumsum(0)
            self._ends[key] = sums.to(device, torch.int32)
        return self._ends[key]


Attend = Callable[[Tensor, Pair, Pair, Packed, Scoring], Tensor]
"""Queries [H, Q, D], own keys and values [G, Q, D], those of the prefix [G, P, D], the rows, the scoring -> the packed
result [Q, H, D] in the type of the values. Queries may be in a wider type. H is a multiple of G: neighbouring heads
share keys."""


def attends_by_rows(model: PreTrainedModel, name: str) -> bool:
    """Whether `attention_by_rows` can replace the model's attention, which has this name in transformers.

    It cannot in models that do not look up their attention by name, and where the cache holds compressed states
    (DeepSeek-V3) in place of keys and values.
    """
    by_name = model._supports_attention_backend and name in REPLACED
    return by_name and not any(hasattr(module, "expand_kv") for module in model.modules())


@contextmanager
def attention_by_rows(model: PreTrainedModel, layers: list[Pair], lengths: list[int], attend: Attend) -> Iterator[None]:
    """Within the context, packed rows of `lengths` tokens attend to themselves and to the prefix in every layer.

    `layers` holds the prefix's keys and values, [1, G, P, D] for each layer; they are not copied.
    """
    with replaced_attention(model, NAME, partial(_attention, layers, Packed(lengths), attend)):
        yield


@contextmanager
def replaced_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within the context, the layers of the model call this attention function of transformers, under this name."""
    config = model.config.get_text_config()
    AttentionInterface.register(name, function)
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def _attention(
    layers: list[Pair],
    rows: Packed,
    attend: Attend,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [1, H, Q, D], keys and values [1, G, Q, D] -> [1, Q, H, D].

    Keys before the rows' own are those of a Cartridge; they stand before the prefix.

    Raises:
        ValueError: the model uses an argument that is not supported here; full rows are then passed instead.
    """
    if others.get("position_bias") is not None:
        raise ValueError("its attention adds a bias by position, which packed rows do not support")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, sliding_window, s_aux)
    with torch.autocast(device, enabled=False):
        more = key.shape[2] - query.shape[2]
        own_keys, own_values = (x[0, :, more:].to(dtype) for x in (key, value))
        keys, values = (x[0].to(dtype) for x in layers[module.layer_idx])
        if more:
            keys, values = (
                torch.cat([first[0, :, :more].to(dtype), x], 1)
                for first, x in zip((key, value), (keys, values), strict=True)
            )
        result = attend(query[0], (own_keys, own_values), (keys, values), rows, scoring)
    return result[None], None


def attend(query: Tensor, own: Pair, shared: Pair, rows: Packed, scoring: Scoring) -> Tensor:
    """An `Attend` for every device."""
    lengths, count = rows.lengths, query.shape[1]
    if scoring.window is None:
        near = varlen(query, own, rows, lengths, lengths, True, scoring)
        result, sums = merged(near, varlen(query, shared, rows, [count], [shared[0].shape[1]], False, scoring))
    else:
        tail = min(shared[0].shape[1], scoring.window - 1)
        keys, values = (
            _behind(x.narrow(1, x.shape[1] - tail, tail), y, lengths) for x, y in zip(shared, own, strict=True)
        )
        result, sums = varlen(query, (keys, values), rows, lengths, [tail + n for n in lengths], True, scoring)
    return with_sink(result, sums, scoring)


def with_sink(result: Tensor, sums: Tensor, scoring: Scoring) -> Tensor:
    """The result [Q, H, D] with sums [H, Q] as it is beside the sink, which takes a share of each query's weights."""
    if scoring.sink is None:
        return result
    return result * torch.sigmoid(sums - scoring.sink.unsqueeze(-1)).T.unsqueeze(-1).to(result.dtype)


def _behind(prefix: Tensor, own: Tensor, lengths: list[int]) -> Tensor:
    """The prefix before each row: [G, p, D] and [G, Q, D] -> [G, rows * p + Q, D]."""
    return torch.cat([x for row in own.split(lengths, 1) for x in (prefix, row)], 1)


def merged(own: Pair, far: Pair) -> Pair:
    """The attention over the keys of both parts: results [Q, H, D] and sums [H, Q]."""
    share = torch.sigmoid(own[1] - far[1]).T.unsqueeze(-1)
    results = [
        torch.lerp(other.to(part.dtype), one.to(part.dtype), part).to(one.dtype)
        for one, other, part in zip(*(x.split(MERGED) for x in (own[0], far[0], share)), strict=True)
    ]
    return torch.cat(results), torch.logaddexp(own[1], far[1])


def varlen(
    query: Tensor, pair: Pair, rows: Packed, queries: list[int], keys: list[int], causal: bool, scoring: Scoring
) -> Pair:
    """Attention of packed queries, a row to its own keys: the result and the logarithm of the sum of weights.

    Args:
        query: [H, Q, D].
        pair: keys and values of all rows, [G, K, D].
        rows: where ends on the device are kept.
        queries: queries of each row; their sum is Q.
        keys: keys of each row; their sum is K.
        causal: query i of L sees the keys up to K - L + i of its row; else all of them, and there is no window.
        scoring: the scale of scores, their cap, the window.

    Returns:
        [Q, H, D] in the type of the values, and [H, Q] in float32 (float64 for float64).
    """
    if uses_flash(query, pair[1], scoring):
        return _flash(query, pair, rows, queries, keys, causal, scoring)
    return blockwise(query, pair, queries, keys, causal, scoring)


def uses_flash(query: Tensor, value: Tensor, scoring: Scoring) -> bool:
    """Whether torch's FlashAttention kernel takes these tensors."""
    fits = value.dtype in FLASH_TYPES and max(query.shape[-1], value.shape[-1]) <= FLASH_WIDTH
    return fits and scoring.softcap is None and has_flash(query.device)


@cache
def has_flash(device: torch.device) -> bool:
    """Whether the device is a GPU that the kernel runs on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FLASH_GPU


def _flash(
    query: Tensor, pair: Pair, rows: Packed, queries: list[int], keys: list[int], causal: bool, scoring: Scoring
) -> Pair:
    width = pair[1].shape[-1]
    whole = 8 * math.ceil(max(query.shape[-1], width) / 8)  # one width for all; zeros change no product
    q, k, v = (pad(x, (0, whole - x.shape[-1])).transpose(0, 1) for x in (query.to(pair[1].dtype), *pair))
    starts, ends = (rows.ends(lengths, query.device) for lengths in (queries, keys))
    window = {} if scoring.window is None else {"window_size_left": scoring.window - 1, "window_size_right": 0}
    flash = torch.ops.aten._flash_attention_forward
    result, sums, *_ = flash(
        q, k, v, starts, ends, max(queries), max(keys), 0.0, causal, False, scale=scoring.scale, **window
    )
    return result.narrow(-1, 0, width), sums


def blockwise(query: Tensor, pair: Pair, queries: list[int], keys: list[int], causal: bool, scoring: Scoring) -> Pair:
    """`varlen` in plain products, for some queries of a row at a time."""
    wide, window = torch.promote_types(pair[1].dtype, torch.float32), scoring.window
    result = pair[1].new_empty(query.shape[1], len(query), pair[1].shape[-1])
    sums = pair[1].new_empty(len(query), query.shape[1], dtype=wide)
    first = 0
    for q, k, v in zip(query.split(queries, 1), *(x.split(keys, 1) for x in pair), strict=True):
        size, k = max(1, SCORES // (len(query) * k.shape[1])), k if k.device.type == "cuda" else k.to(wide)
        for begin in range(0, q.shape[1], size):
            block = q[:, begin : begin + size]
            last = k.shape[1] - q.shape[1] + begin + block.shape[1] if causal else k.shape[1]
            seen = slice(0 if window is None else max(0, last - block.shape[1] - window + 1), last)
            here = slice(first + begin, first + begin + block.shape[1])
            result[here], sums[:, here] = _block(block, k[:, seen], v[:, seen], causal, scoring)
        first += q.shape[1]
    return result, sums


def _block(query: Tensor, key: Tensor, value: Tensor, causal: bool, scoring: Scoring) -> Pair:
    """Queries [H, n, D] and keys [G, K, D], the last one that of the last query -> [n, H, D] and [H, n]."""
    (heads, count, _), groups = query.shape, len(key)
    grouped = query.reshape(groups, -1, query.shape[-1])
    scores = products(grouped, key, scoring).view(groups, -1, count, key.shape[1])
    if causal:
        places = torch.arange(key.shape[1], device=query.device)
        own = places[-count:, None]
        hidden = places > own if scoring.window is None else (places > own) | (places <= own - scoring.window)
        scores.masked_fill_(hidden, -torch.inf)
    sums = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(sums).exp_().to(value.dtype).flatten(1, 2)
    result = torch.bmm(weights, value).view(heads, count, -1).transpose(0, 1)
    return result, sums.view(heads, count)


def products(query: Tensor, key: Tensor, scoring: Scoring) -> Tensor:
    """Scores of queries [N, n, D] and keys [N, K, D], scaled and capped: [N, n, K] in float32 (float64 for float64).

    A GPU adds up products of bfloat16 in float32 by itself; elsewhere both are in float32 first.
    """
    if key.device.type == "cuda" and key.dtype in FLASH_TYPES:
        scores = torch.bmm(query.to(key.dtype), key.mT, out_dtype=torch.float32).mul_(scoring.scale)
    else:
        wide = torch.promote_types(key.dtype, torch.float32)
        scores = torch.bmm(query.to(wide) * scoring.scale, key.to(wide).mT)
    return scores if scoring.softcap is None else scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
