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

SHORT = 768
"""Prefix and row together: the longest that is computed with every row's own copy of the prefix's keys."""

SAMPLED = 16
"""One of so many keys of the prefix is looked at for a query's largest score."""

Pair = tuple[Tensor, Tensor]
"""Keys and values."""


def attends_by_rows(model: PreTrainedModel) -> bool:
    """Whether it stands in for the model's own attention: on a CPU, for SDPA."""
    name = model.config.get_text_config()._attn_implementation
    return model.device.type == "cpu" and name in ("sdpa", cpu_attention.NAME)


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
        raise ValueError(f"attention with {', '.join(unknown)} cannot be had row by row")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(device, enabled=False):
        queries, *own = (x[0].to(dtype) for x in (query * scale, key, value))
        keys, values = (x[0].to(dtype) for x in layers[module.layer_idx])
        if keys.shape[1] + max(lengths) <= min(SHORT, sliding_window or SHORT):
            return _side_by_side(lengths, queries, (keys, values), (own[0], own[1])), None
        grouped = queries.unflatten(0, (len(keys), -1))
        rows = zip(grouped.split(lengths, 2), *(x.split(lengths, 1) for x in own), strict=True)
        results = [_row(row, (keys, values), (k, v), sliding_window) for row, k, v in rows]
    return torch.cat(results, dim=2).flatten(0, 1).transpose(0, 1)[None], None


def _side_by_side(lengths: list[int], queries: Tensor, shared: Pair, own: Pair) -> Tensor:
    """Rows padded to the longest, each with the prefix before it: [H, Q, D], keys [G, ., D] -> [1, Q, H, D]."""

    def padded(packed: Tensor) -> Tensor:
        """A row each: [heads, Q, D] -> [rows, heads, longest, D]."""
        rows = [row.transpose(0, 1) for row in packed.split(lengths, 1)]
        return pad_sequence(rows, batch_first=True).transpose(1, 2)

    keys, values = (
        torch.cat([prefix.expand(len(lengths), -1, -1, -1), padded(packed)], 2)
        for prefix, packed in zip(shared, own, strict=True)
    )
    result = cpu_attention.causal_attention(padded(queries), keys, values, 1.0)
    return torch.cat([row[:length] for row, length in zip(result, lengths, strict=True)])[None]


def _row(queries: Tensor, shared: Pair, own: Pair, window: int | None) -> Tensor:
    """One row: [G, heads of a group, L, D], keys and values [G, ., D] -> [G, heads, L, D], some queries at a time."""
    _, heads, length, _ = queries.shape
    step = max(1, SCORES // (heads * (shared[0].shape[1] + length)))
    parts = zip(range(0, length, step), queries.split(step, 2), strict=True)
    return torch.cat([_some(part, shared, own, first, window) for first, part in parts], dim=2)


def _some(queries: Tensor, shared: Pair, own: Pair, first: int, window: int | None) -> Tensor:
    """The same for the queries from `first` on: [G, heads, n, D] -> [G, heads, n, D]."""
    _, heads, count, _ = queries.shape
    prefix, last = shared[0].shape[1], first + count
    begin = 0 if window is None else min(prefix, max(0, prefix + first - window + 1))  # the first that any of them sees
    keys, values, own_keys, own_values = (*(x[:, begin:] for x in shared), *(x[:, :last] for x in own))

    def hide(scores: Tensor) -> None:
        """-inf where a query does not see a key: [..., heads * n, K], keys up to `last`."""
        _hide(scores.unflatten(-2, (heads, count)), prefix + first, prefix + last, window)

    flat = queries.flatten(1, 2)
    top = _largest(flat, keys[:, ::SAMPLED], own_keys, hide)
    from_key = 0 if window else keys.shape[1]  # before it, all is seen
    groups = zip(flat, top, keys, values, own_keys, own_values, strict=True)
    results = [_weighted(q, t, (k, v), (own_k, own_v), hide, from_key) for q, t, k, v, own_k, own_v in groups]
    return torch.stack(results).view(*queries.shape[:3], -1)


def _weighted(
    queries: Tensor, top: Tensor, shared: Pair, own: Pair, hide: Callable[[Tensor], None], from_key: int
) -> Tensor:
    """The values, weighed by the softmax of the scores: [m, D], `top` [m, 1], one pair of each kind -> [m, D]."""
    keys, values = shared
    scores = queries.new_empty(len(queries), len(keys) + len(own[0]))
    torch.addmm(-top, queries, keys.T, out=scores[:, : len(keys)])
    torch.addmm(-top, queries, own[0].T, out=scores[:, len(keys) :])
    hide(scores[:, from_key:])
    torch.softmax(scores, -1, out=scores)  # every row is summed up before its first number is written
    result = scores[:, : len(keys)] @ values
    return result.addmm_(scores[:, len(keys) :], own[1])


def _largest(queries: Tensor, some: Tensor, own: Tensor, hide: Callable[[Tensor], None]) -> Tensor:
    """About the largest score of each query, from some keys of the prefix and its own row's: [G, m, D] -> [G, m, 1].

    A product adds up in float32 and is rounded once. With this taken off before, bfloat16 costs little where
    the softmax looks, near the largest; without, it loses what tells large scores apart (a bias on Qwen2's keys).
    """
    scores = torch.bmm(queries, own.mT)
    hide(scores)
    return torch.cat([scores, torch.bmm(queries, some.mT)], -1).amax(-1, keepdim=True)


def _hide(scores: Tensor, query: int, end: int, window: int | None) -> None:
    """-inf for keys after their query or too far before it: [..., n, K], queries from `query` on, keys up to `end`."""
    keys = torch.arange(end - scores.shape[-1], end)
    distance = torch.arange(query, query + scores.shape[-2])[:, None] - keys
    scores.masked_fill_((distance < 0) if window is None else (distance < 0) | (distance >= window), -torch.inf)
