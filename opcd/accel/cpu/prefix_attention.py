"""Attention of rows that are packed behind a prefix, without a mask, on a CPU.

What all queries get from the prefix is computed first, in blocks of queries and keys, with the sum of their weights; to
the softmax over a row's own keys, that sum is one more key.

torch's kernel with a mask computes what the mask then hides and leaves its fast path: twice as long as this
(docs/log.md). On a GPU, FlexAttention does the same with blocks (`packing.py`).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from opcd.accel.cpu import attention as cpu_attention

NAME = "opcd_packed_rows"
"""What transformers calls it."""

QUERIES, KEYS = 3072, 2048
"""Of one group of heads, at most, and of the prefix, in a product: 12 MiB of scores in bfloat16."""

OWN_QUERIES = 128
"""Of a row, in a product with its own keys."""

SCORES = 2**21
"""Of rows with their own keys at a time: 8 MiB, which glibc keeps for the next ones."""

SAMPLED = 16
"""One of so many keys of the prefix is looked at for a query's largest score."""

LOG2_E = math.log2(math.e)

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


def attends_by_rows(model: PreTrainedModel) -> bool:
    """Whether it stands in for the model's own attention: on a CPU, for SDPA, where the cache holds keys and values.

    DeepSeek-V3's holds what they are expanded from.
    """
    if not model._supports_attention_backend:  # it would not ask by this name
        return False
    name = model.config.get_text_config()._attn_implementation
    sdpa = model.device.type == "cpu" and name in ("sdpa", cpu_attention.NAME)
    return sdpa and not any(hasattr(module, "expand_kv") for module in model.modules())


@contextmanager
def attention_by_rows(model: PreTrainedModel, layers: list[Pair], lengths: list[int]) -> Iterator[None]:
    """Within, every layer attends from packed rows of `lengths` tokens to themselves and to the prefix before.

    `layers` are the prefix's keys and values, [1, groups, P, D]; they are read where they lie.
    """
    config = model.config.get_text_config()
    AttentionInterface.register(NAME, partial(_attention, layers, lengths))
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def _attention(
    layers: list[Pair],
    lengths: list[int],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """As transformers calls it: [1, heads, Q, D], keys and values [1, groups, Q, D] -> [1, Q, heads, D].

    Raises:
        ValueError: for what few families ask of their attention; every row is then passed through whole.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]:
        raise ValueError(f"its attention has {', '.join(unknown)}, which is not known here; attention: eager has it")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        queries, *own = (x[0].to(dtype) for x in (query * (scale * LOG2_E), key, value))
        keys, values = (x[0].to(dtype) for x in layers[module.layer_idx])
        grouped = queries.unflatten(0, (len(keys), -1))
        before = _from_prefix(grouped, (keys, values), lengths, sliding_window)
        rows = list(zip(*(x.split(lengths, -2) for x in (grouped, *own, *before)), strict=True))
        some = max(1, SCORES // (len(queries) * min(OWN_QUERIES, max(lengths)) * max(lengths)))
        results = [_rows(rows[first : first + some], sliding_window) for first in range(0, len(rows), some)]
    return torch.cat(results)[None], None


def _from_prefix(queries: Tensor, shared: Pair, lengths: list[int], window: int | None) -> Pair:
    """Attention to the prefix alone, and the logarithm of the sum of each query's weights, in float32 at least.

    Queries [G, heads of a group, Q, D], scaled for powers of 2; keys and values [G, P, D] -> [G, heads, Q, D] and
    [G, heads, Q, 1].
    """
    groups, heads, count, _ = queries.shape
    keys, values = (x[:, 0 if window is None else max(0, x.shape[1] - window + 1) :] for x in shared)
    places = torch.cat([torch.arange(length) for length in lengths]).repeat(heads)[:, None]
    hidden = None if window is None else places + (keys.shape[1] - window + 1)  # so many keys, for each query
    size = math.ceil(heads * count / math.ceil(heads * count / QUERIES))  # all alike: a small product is slow
    blocks = [slice(first, first + size) for first in range(0, heads * count, size)]
    parts = [
        _weighted(group[block], k, v, None if hidden is None else hidden[block])
        for group, k, v in zip(queries.flatten(1, 2), keys, values, strict=True)
        for block in blocks
    ]
    results, sums = (torch.cat(x).view(groups, heads, count, -1) for x in zip(*parts, strict=True))
    return results, sums


def _weighted(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, step: int = SAMPLED) -> Pair:
    """The same of one group: [m, D], [P, D] -> [m, D], [m, 1]. `hidden` [m, 1] are the first keys, not to be seen."""
    wide = torch.promote_types(values.dtype, torch.float32)
    top = _largest(queries, keys, hidden, step)
    # With one column more, their product is the score less `top`.
    left, right = torch.cat([queries, -top], -1), torch.cat([keys, torch.ones_like(keys[:, :1])], -1)
    result, total = queries.new_zeros(len(queries), values.shape[1], dtype=wide), top.new_zeros(top.shape, dtype=wide)
    for first in range(0, len(keys), KEYS):
        weights = left @ right[first : first + KEYS].T
        if hidden is not None:
            _hide(weights, hidden - first)
        weights.exp2_()
        total += weights.sum(-1, keepdim=True)
        result += weights @ values[first : first + KEYS]
    if step > 1 and not math.isfinite(result.sum()):  # a score far above those looked at
        return _weighted(queries, keys, values, hidden, step=1)
    return result.div_(total.clamp(min=torch.finfo(wide).tiny)), (top + total.log2()) / LOG2_E


def _largest(queries: Tensor, keys: Tensor, hidden: Tensor | None, step: int) -> Tensor:
    """About the largest score of each query, from one of `step` keys, from all with a window: [m, D] -> [m, 1].

    A product adds up in float32 and is rounded once. With this taken off before, bfloat16 costs little where
    the softmax looks, near the largest; without, it loses what tells large scores apart (a bias on Qwen2's keys).
    """
    if hidden is None:
        return (queries @ keys[::step].T).amax(-1, keepdim=True)
    scores = queries @ keys.T
    _hide(scores, hidden)
    return scores.amax(-1, keepdim=True)


def _hide(scores: Tensor, hidden: Tensor) -> None:
    scores.masked_fill_(torch.arange(scores.shape[-1]) < hidden, -torch.inf)


def _rows(rows: list[tuple[Tensor, ...]], window: int | None) -> Tensor:
    """Some rows side by side, the prefix a key more to each: packed [their tokens, H, D].

    A row is queries [G, heads of a group, L, D], its own keys and values [G, L, D], and what `_from_prefix` gave.
    """
    queries, keys, values, from_prefix, sums = (_padded(x).flatten(0, 1) for x in zip(*rows, strict=True))
    keys, results, last = cpu_attention.wide(keys).mT, [], 0
    for some, result, total in zip(*(x.split(OWN_QUERIES, 2) for x in (queries, from_prefix, sums)), strict=True):
        first, last = last, last + some.shape[2]
        scores = torch.bmm(cpu_attention.wide(some).flatten(1, 2), keys[..., :last]).div_(LOG2_E)
        scores.unflatten(1, some.shape[1:3]).masked_fill_(_unseen(first, last, window), -torch.inf)
        weights = torch.softmax(torch.cat([scores, total.flatten(1, 2)], -1), -1)
        of_row = torch.bmm(weights[..., :-1].to(values.dtype), values[:, :last])
        results.append(torch.addcmul(of_row, weights[..., -1:], result.flatten(1, 2)).view_as(result))
    together = torch.cat(results, 2).to(values.dtype).unflatten(0, (len(rows), -1)).flatten(1, 2).transpose(1, 2)
    return torch.cat([row[: own.shape[-2]] for row, (_, own, *_) in zip(together, rows, strict=True)])


def _unseen(first: int, last: int, window: int | None) -> Tensor:
    """Keys after their query or too far before it: [last - first, last]."""
    distance = torch.arange(first, last)[:, None] - torch.arange(last)
    return (distance < 0) if window is None else (distance < 0) | (distance >= window)


def _padded(rows: tuple[Tensor, ...]) -> Tensor:
    """[..., L, D] each, to the longest: [rows, ..., L, D]."""
    return pad_sequence([row.movedim(-2, 0) for row in rows], batch_first=True).movedim(1, -2)
