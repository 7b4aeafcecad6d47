"""Attention of rows side by side behind one prefix, whose keys and values are there once and not in every row.

For generation: in every step the queries of all rows attend to the prefix together, and each row to its own tokens. The
two are merged as in `packed_attention.py`. A cache with the prefix in every row would hold it, and read it, as many
times as there are rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from opcd.accel import packed_attention
from opcd.accel.packed_attention import Packed, Pair, Scoring, merged, products, replaced_attention, varlen, with_sink

NAME = "opcd_shared_context"
"""The name of this attention in transformers."""


@contextmanager
def behind_one_prefix(model: PreTrainedModel, layers: list[Pair]) -> Iterator[None]:
    """Within the context, all rows attend to one prefix and to their own keys, which alone are in the cache.

    Args:
        model: one of `attends_by_rows`, without sliding windows.
        layers: the prefix's keys and values, [1, G, P, D] for each layer; they are not copied.
    """
    AttentionMaskInterface.register(NAME, sdpa_mask)
    with replaced_attention(model, NAME, partial(_attention, layers, Packed([]))):
        yield


@torch.no_grad()
def _attention(
    layers: list[Pair],
    ends: Packed,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, H, t, D], own keys and values [B, G, K, D] -> [B, t, H, D].

    The mask is [B, 1, t, P + K], bool; None: every query sees all keys.
    """
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    scoring = Scoring(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, None, s_aux)
    with torch.autocast(device, enabled=False):
        keys, values = (x[0].to(dtype) for x in layers[module.layer_idx])
        seen = None if attention_mask is None else attention_mask[..., keys.shape[1] :]
        own = key.to(dtype), value.to(dtype)
        return attend(query, own, (keys, values), seen, ends, scoring), None


def attend(query: Tensor, own: Pair, shared: Pair, seen: Tensor | None, ends: Packed, scoring: Scoring) -> Tensor:
    """Attention of each row to the prefix and to its own keys.

    Args:
        query: [B, H, t, D].
        own: keys and values of each row, [B, G, K, D].
        shared: those of the prefix, [G, P, D].
        seen: which of its own keys a query sees, [B, 1, t, K] bool; None: all.
        ends: keeps the ends of sequences on the device.
        scoring: how scores are made.

    Returns:
        [B, t, H, D] in the type of the values.
    """
    rows, heads, count, _ = query.shape
    result, sums = _to_own(query, own, seen, scoring)
    near = result.flatten(0, 1), sums.transpose(0, 1).flatten(1)
    together = query.transpose(0, 1).flatten(1, 2)
    far = varlen(together, shared, ends, [rows * count], [shared[0].shape[1]], False, scoring)
    return with_sink(*merged(near, far), scoring).view(rows, count, heads, -1)


def _to_own(query: Tensor, pair: Pair, seen: Tensor | None, scoring: Scoring) -> Pair:
    """Attention of each row to its own keys, some rows at a time: [B, t, H, D] and [B, H, t]."""
    size = max(1, packed_attention.SCORES // (query.shape[1] * query.shape[2] * pair[0].shape[2]))
    parts = list(zip(*(x.split(size) for x in (query, *pair)), strict=True))
    masks = [None] * len(parts) if seen is None else seen.split(size)
    found = [_side_by_side(q, k, v, mask, scoring) for (q, k, v), mask in zip(parts, masks, strict=True)]
    results, sums = zip(*found, strict=True)
    return torch.cat(results), torch.cat(sums)


def _side_by_side(query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scoring: Scoring) -> Pair:
    """Queries [b, H, t, D], keys and values [b, G, K, D], a mask [b, 1, t, K] -> [b, t, H, D] and [b, H, t]."""
    rows, heads, count, _ = query.shape
    grouped = query.reshape(rows * key.shape[1], -1, query.shape[-1])
    scores = products(grouped, key.flatten(0, 1), scoring).view(rows, heads, count, -1)
    if seen is not None:
        # Not -inf: a place of padding may see none of its row's keys, and must stay a number.
        scores.masked_fill_(~seen, torch.finfo(scores.dtype).min)
    sums = scores.logsumexp(-1, keepdim=True)
    weights = scores.sub_(sums).exp_().to(value.dtype).view(len(grouped), -1, key.shape[2])
    result = torch.bmm(weights, value.flatten(0, 1)).view(rows, heads, count, -1)
    return result.transpose(1, 2), sums.squeeze(-1)
