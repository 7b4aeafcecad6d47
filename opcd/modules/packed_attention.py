"""Attention of rows that are packed behind a prefix, one row after the other and without a mask, on a CPU.

torch's kernel with a mask computes what the mask then hides and leaves its fast path: twice as long as this
(docs/log.md). On a GPU, FlexAttention does the same with blocks (`packing.py`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, PreTrainedModel

from opcd.modules import cpu_attention

NAME = "opcd_packed_rows"
"""What transformers calls it."""

SCORES = 2**21
"""Attention scores at a time: 4 MiB in bfloat16, so that they stay in a cache."""

SHORT = 1024
"""Prefix and row together: the longest that is computed with every row's own copy of the prefix's keys."""

SAMPLED = 16
"""One of so many keys of the prefix is looked at for a query's largest score."""

Pair = tuple[Tensor, Tensor]
"""Keys and values, [K, D] each."""


def attends_by_rows(model: PreTrainedModel) -> bool:
    """Whether it stands in for the model's own attention: on a CPU, for SDPA."""
    name = model.config.get_text_config()._attn_implementation
    return model.device.type == "cpu" and name in ("sdpa", cpu_attention.NAME)


@contextmanager
def attention_by_rows(model: PreTrainedModel, prefix: int, lengths: list[int]) -> Iterator[None]:
    """Within, every layer attends from packed rows of `lengths` tokens to themselves and to `prefix` tokens before."""
    config = model.config.get_text_config()
    AttentionInterface.register(NAME, partial(_attention, prefix, lengths))
    before, config._attn_implementation = config._attn_implementation, NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@torch.no_grad()
def _attention(
    prefix: int,
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
    """As transformers calls it: [1, heads, Q, D], keys and values [1, groups, prefix + Q, D] -> [1, Q, heads, D].

    Raises:
        ValueError: for what few families ask of their attention; every row is then passed through whole.
    """
    if unknown := [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]:
        raise ValueError(f"attention with {', '.join(unknown)} cannot be had row by row")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        queries, keys, values = (query[0] * scale).to(dtype), key[0].to(dtype), value[0].to(dtype)
        if prefix + max(lengths) <= min(SHORT, sliding_window or SHORT):
            return _side_by_side(prefix, lengths, queries, keys, values), None
        rows = queries.unflatten(0, (len(keys), -1)).split(lengths, dim=2)  # each [groups, heads of a group, L, D]
        own = [x[:, prefix:].split(lengths, dim=1) for x in (keys, values)]
        results = [
            torch.stack(
                [
                    _row(row[g], (keys[g, :prefix], values[g, :prefix]), (own_keys[g], own_values[g]), sliding_window)
                    for g in range(len(keys))
                ]
            )
            for row, own_keys, own_values in zip(rows, *own, strict=True)
        ]
    return torch.cat(results, dim=2).flatten(0, 1).transpose(0, 1)[None], None


def _side_by_side(prefix: int, lengths: list[int], queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Rows padded to the longest, each with the prefix before it: [H, Q, D], keys [G, P + Q, D] -> [1, Q, H, D]."""

    def padded(packed: Tensor) -> Tensor:
        rows = [row.transpose(0, 1) for row in packed.split(lengths, 1)]
        return pad_sequence(rows, batch_first=True).transpose(1, 2)

    def behind_prefix(packed: Tensor) -> Tensor:
        shared = packed[:, :prefix].expand(len(lengths), -1, -1, -1)
        return torch.cat([shared, padded(packed[:, prefix:])], 2)

    result = cpu_attention.causal_attention(padded(queries), behind_prefix(keys), behind_prefix(values), 1.0)
    return torch.cat([row[:length] for row, length in zip(result, lengths, strict=True)])[None]


def _row(queries: Tensor, shared: Pair, own: Pair, window: int | None) -> Tensor:
    """One row's heads over one pair of keys and values: [heads, L, D] -> [heads, L, D], some queries at a time."""
    heads, length, _ = queries.shape
    step = max(1, SCORES // (heads * (len(shared[0]) + length)))
    parts = [
        _some(part, shared, own, first, window)
        for first, part in zip(range(0, length, step), queries.split(step, 1), strict=True)
    ]
    return torch.cat(parts, dim=1)


def _some(queries: Tensor, shared: Pair, own: Pair, first: int, window: int | None) -> Tensor:
    """The same for the queries from `first` on: [heads, n, D] -> [heads, n, D]."""
    heads, count, size = queries.shape
    prefix, last = len(shared[0]), first + count
    begin = 0 if window is None else min(prefix, max(0, prefix + first - window + 1))  # the first that any of them sees
    keys, values, own_keys, own_values = shared[0][begin:], shared[1][begin:], own[0][:last], own[1][:last]

    def hide(scores: Tensor) -> None:
        """-inf where a query does not see a key: [heads * n, K], keys up to `last`."""
        _hide(scores.unflatten(0, (heads, count)), prefix + first, prefix + last, window)

    flat = queries.reshape(-1, size)
    top = _largest(flat, keys[::SAMPLED], own_keys, hide)
    scores = flat.new_empty(len(flat), len(keys) + last)
    torch.addmm(-top, flat, keys.T, out=scores[:, : len(keys)])
    torch.addmm(-top, flat, own_keys.T, out=scores[:, len(keys) :])
    hide(scores[:, 0 if window else len(keys) :])
    torch.softmax(scores, -1, out=scores)  # every row is summed up before its first number is written
    result = scores[:, : len(keys)] @ values
    return result.addmm_(scores[:, len(keys) :], own_values).view(heads, count, -1)


def _largest(queries: Tensor, some: Tensor, own: Tensor, hide: Callable[[Tensor], None]) -> Tensor:
    """About the largest score of each query, from some keys of the prefix and its own row's: [n, D] -> [n, 1].

    A product adds up in float32 and is rounded once. With this taken off before, bfloat16 costs little where
    the softmax looks, near the largest; without, it loses what tells large scores apart (a bias on Qwen2's keys).
    """
    scores = queries @ own.T
    hide(scores)
    return torch.cat([scores, queries @ some.T], -1).amax(-1, keepdim=True)


def _hide(scores: Tensor, query: int, end: int, window: int | None) -> None:
    """-inf for keys after their query or too far before it: [..., n, K], queries from `query` on, keys up to `end`."""
    keys = torch.arange(end - scores.shape[-1], end)
    distance = torch.arange(query, query + scores.shape[-2])[:, None] - keys
    scores.masked_fill_((distance < 0) if window is None else (distance < 0) | (distance >= window), -torch.inf)
