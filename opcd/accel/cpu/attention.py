"""Two attentions on a CPU, made of a few matrix products: causal attention, and that of rows packed behind a prefix.

Causal attention takes 0.4 to 0.7 of the time of torch's kernel up to 512 tokens, 0.9 at 2,048 (docs/log.md). Keys after
a block of queries are skipped. Scores and their softmax are in float32 (float64 for float64). The backward pass
recomputes the probabilities from queries, keys and values, as FlashAttention does (arXiv:2205.14135).

Rows behind a prefix need no mask: first all queries attend to the prefix, in blocks of queries and keys, which also
gives the sum of each query's weights. That sum is one more key in the softmax over a row's own keys. torch's kernel
with a mask takes twice as long, because it computes what the mask hides and leaves its fast path (docs/log.md).
`packed_attention.py` has the same for other devices.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opcd.accel.packed_attention import Packed, Pair, Scoring, attend

NAME = "opcd_cpu"
"""The name of the causal one in transformers."""

ROWS = "opcd_rows"
"""The argument for rows that share their beginning (`student_prefix.py`): how many rows, and how many shared tokens."""

QUERIES, PACKED_QUERIES = 64, 128
"""Queries of a row in one product, of each attention."""

SCORES = 2**21
"""Attention scores at a time: 8 MiB, which glibc keeps for the next ones."""

PREFIX_QUERIES, PREFIX_KEYS = 3072, 2048
"""The most queries of a group of heads and keys of the prefix in one product: 12 MiB of scores in bfloat16."""

SAMPLED = 16
"""A query's largest score is estimated from one in so many keys of the prefix."""

LOG2_E = math.log2(math.e)


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Replace SDPA wherever a pass on a CPU is causal, without mask, prefix or dropout.

    Models that do not look up transformers' attention by name keep their own: Falcon would treat any name other than
    `sdpa` as `eager`.
    """
    config = model.config.get_text_config()
    if config._attn_implementation == "sdpa" and model._supports_attention_backend:
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **others: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function: [B, H, L, D], keys and values [B, G, K, D] -> [B, L, H, D].

    With `ROWS` in `others` the tensors are [1, H, N, D]: the shared tokens, then those of each row. The mask is unused.
    More keys than queries: those of a Cartridge come first, and all queries see them.
    """
    if (shared := others.pop(ROWS, None)) is not None:
        rows, first = shared
        more = key.shape[2] - query.shape[2]
        query, key, value = _whole(query, rows, first), *(_whole(x, rows, more + first) for x in (key, value))
        result, _ = attention(module, query, key, value, None, **others)
        return torch.cat([result[0, :first], result[:, first:].flatten(0, 1)])[None], None
    if not (attention_mask is None and query.device.type == "cpu" and _is_plain(module, query, key, others)):
        of_torch: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return of_torch
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    return causal_attention(query.to(dtype), key.to(dtype), value.to(dtype), others.get("scaling")), None


def _whole(x: Tensor, rows: int, shared: int) -> Tensor:
    """The shared tokens before each row's own, [1, H, shared + rows * L, D] -> [rows, H, shared + L, D]."""
    own = x[0, :, shared:].unflatten(1, (rows, -1)).transpose(0, 1)
    return torch.cat([x[:, :, :shared].expand(rows, -1, -1, -1), own], 2)


def _unsupported(others: dict[str, Any]) -> list[str]:
    """Arguments of an attention that neither of the two implements."""
    return [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]


def _is_plain(module: Any, query: Tensor, key: Tensor, others: dict[str, Any]) -> bool:
    causal, length = others.get("is_causal"), query.shape[2]
    plain = 1 < length <= key.shape[2] and not others.get("dropout") and not _unsupported(others)
    return plain and bool(getattr(module, "is_causal", True) if causal is None else causal)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query keyᵀ * scale) value, where query i sees the keys up to K - L + i.

    Args:
        query: [B, H, L, D].
        key: [B, G, K, D], K >= L; H is a multiple of G, and neighbouring heads share keys.
        value: [B, G, K, E].
        scale: D ** -0.5 if None.

    Returns:
        [B, L, H, E], the layout of transformers, in the dtype of `value`. Differentiable once.
    """
    result: Tensor = _Causal.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return result


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        with torch.autocast("cpu", enabled=False):
            return torch.cat([_forward(scale, *rows) for rows in _by_rows(query, key, value)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            gradients = [_backward(ctx.scale, *rows) for rows in _by_rows(query, key, value, gradient)]
        return *(torch.cat(rows) for rows in zip(*gradients, strict=True)), None


def _by_rows(query: Tensor, key: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the tensors of a few rows at a time."""
    scores = query.shape[1] * min(QUERIES, query.shape[2]) * key.shape[2]
    return zip(*(x.split(max(1, SCORES // scores)) for x in (query, key, *others)), strict=True)


def _forward(scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[b, H, L, D], keys [b, G, K, D] -> [b, L, H, E]."""
    queries, keys, values = _scaled(query, key, scale), _wide(key.flatten(0, 1)), value.flatten(0, 1)
    rows, heads, length, _ = query.shape
    result = value.new_empty(rows, length, heads, value.shape[-1])
    for block, seen in _blocks(query, key):
        likely = _probabilities(queries[:, :, block], keys[:, :seen]).to(value.dtype)
        result[:, block] = torch.bmm(likely, values[:, :seen]).view(rows, heads, -1, value.shape[-1]).transpose(1, 2)
    return result


def _backward(scale: float, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The gradients of query, key and value from that of the result, [b, L, H, E]."""
    queries, keys, values = _scaled(query, key, scale), _wide(key.flatten(0, 1)), value.flatten(0, 1)
    low_queries, gradient = queries.to(value.dtype), gradient.transpose(1, 2)
    # The gradients of a row's scores sum to zero up to rounding, which a bias on the keys (Qwen2's) would amplify.
    low_keys = (keys - keys.mean(1, keepdim=True)).to(value.dtype)
    of_queries, of_keys, of_values = (torch.zeros_like(x) for x in (low_queries, keys, _wide(values)))
    for block, seen in _blocks(query, key):
        of_result = gradient[:, :, block].reshape(len(values), -1, value.shape[-1])
        likely = _probabilities(queries[:, :, block], keys[:, :seen]).to(value.dtype)
        of_values[:, :seen] += torch.bmm(likely.transpose(1, 2), of_result)
        of_scores = torch.bmm(of_result, values[:, :seen].transpose(1, 2)).mul_(likely)
        mean = of_scores.sum(-1, keepdim=True, dtype=keys.dtype).to(value.dtype)
        of_scores.addcmul_(likely, mean, value=-1)
        of_queries[:, :, block] = torch.bmm(of_scores, low_keys[:, :seen]).view_as(of_queries[:, :, block])
        of_keys[:, :seen] += torch.bmm(of_scores.transpose(1, 2), low_queries[:, :, block].flatten(1, 2))
    of_all = (of_queries * scale, of_keys, of_values)
    return tuple(x.to(of.dtype).view(of.shape) for x, of in zip(of_all, (query, key, value), strict=True))


def _probabilities(queries: Tensor, keys: Tensor) -> Tensor:
    """Scaled queries [N, h, n, D] and the keys that the last query sees, [N, K, D] -> [N, h * n, K]."""
    count = queries.shape[2]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1, out=scores)  # a row is summed before its first number is written


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, int]]:
    """Yield a block of queries and how many keys its last query sees."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    for first in range(0, length, QUERIES):
        last = min(length, first + QUERIES)
        yield slice(first, last), before + last


def _scaled(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Queries whose heads share keys together: [b, H, L, D] -> [b * G, H / G, L, D]."""
    return (_wide(query) * scale).reshape(len(key) * key.shape[1], -1, *query.shape[2:])


def _wide(x: Tensor) -> Tensor:
    """The tensor in float32, the dtype of scores and their softmax; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


@torch.no_grad()
def attend_packed(query: Tensor, own: Pair, shared: Pair, rows: Packed, scoring: Scoring) -> Tensor:
    """The `Attend` of a CPU; capped scores and sinks take the one of every device."""
    if scoring.softcap is not None or scoring.sink is not None:
        return attend(query, own, shared, rows, scoring)
    lengths, window = rows.lengths, scoring.window
    grouped = (query * (scoring.scale * LOG2_E)).to(own[1].dtype).unflatten(0, (len(shared[0]), -1))
    before = _from_prefix(grouped, shared, lengths, window)
    each = list(zip(*(x.split(lengths, -2) for x in (grouped, *own, *before)), strict=True))
    some = max(1, SCORES // (len(query) * min(PACKED_QUERIES, max(lengths)) * max(lengths)))
    return torch.cat([_rows(each[first : first + some], window) for first in range(0, len(each), some)])


def _from_prefix(queries: Tensor, shared: Pair, lengths: list[int], window: int | None) -> Pair:
    """Attention to the prefix alone, and the logarithm of the sum of each query's weights, in float32 at least.

    Queries [G, heads of a group, Q, D], scaled for powers of 2; keys and values [G, P, D] -> [G, heads, Q, D] and
    [G, heads, Q, 1].
    """
    groups, heads, count, _ = queries.shape
    keys, values = (x[:, 0 if window is None else max(0, x.shape[1] - window + 1) :] for x in shared)
    places = torch.cat([torch.arange(length) for length in lengths]).repeat(heads)[:, None]
    hidden = None if window is None else places + (keys.shape[1] - window + 1)  # masked first keys of each query
    # Blocks of equal size: a small product is slow.
    size = math.ceil(heads * count / math.ceil(heads * count / PREFIX_QUERIES))
    blocks = [slice(first, first + size) for first in range(0, heads * count, size)]
    parts = [
        _weighted(group[block], k, v, None if hidden is None else hidden[block])
        for group, k, v in zip(queries.flatten(1, 2), keys, values, strict=True)
        for block in blocks
    ]
    results, sums = (torch.cat(x).view(groups, heads, count, -1) for x in zip(*parts, strict=True))
    return results, sums


def _weighted(queries: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None, step: int = SAMPLED) -> Pair:
    """The same for one group: [m, D], [P, D] -> [m, D], [m, 1]. `hidden` [m, 1] is how many first keys are masked."""
    wide = torch.promote_types(values.dtype, torch.float32)
    top = _largest(queries, keys, hidden, step)
    # With one more column, the product is the score minus `top`.
    left, right = torch.cat([queries, -top], -1), torch.cat([keys, torch.ones_like(keys[:, :1])], -1)
    result, total = queries.new_zeros(len(queries), values.shape[1], dtype=wide), top.new_zeros(top.shape, dtype=wide)
    for first in range(0, len(keys), PREFIX_KEYS):
        weights = left @ right[first : first + PREFIX_KEYS].T
        if hidden is not None:
            _hide(weights, hidden - first)
        weights.exp2_()
        total += weights.sum(-1, keepdim=True)
        result += weights @ values[first : first + PREFIX_KEYS]
    if step > 1 and not math.isfinite(result.sum()):  # a score was far above the sampled ones
        return _weighted(queries, keys, values, hidden, step=1)
    return result.div_(total.clamp(min=torch.finfo(wide).tiny)), (top + total.log2()) / LOG2_E


def _largest(queries: Tensor, keys: Tensor, hidden: Tensor | None, step: int) -> Tensor:
    """About the largest score of each query, from one in `step` keys, with a window from all: [m, D] -> [m, 1].

    Products add up in float32 and are rounded once. If this value is subtracted first, bfloat16 loses little near the
    largest scores, where the softmax matters; else it cannot tell large scores apart (a bias on Qwen2's keys).
    """
    if hidden is None:
        return (queries @ keys[::step].T).amax(-1, keepdim=True)
    scores = queries @ keys.T
    _hide(scores, hidden)
    return scores.amax(-1, keepdim=True)


def _hide(scores: Tensor, hidden: Tensor) -> None:
    scores.masked_fill_(torch.arange(scores.shape[-1]) < hidden, -torch.inf)


def _rows(rows: list[tuple[Tensor, ...]], window: int | None) -> Tensor:
    """Attention of some rows side by side, with the prefix as one more key of each: packed [their tokens, H, D].

    A row is queries [G, heads of a group, L, D], its own keys and values [G, L, D], and the results of `_from_prefix`.
    """
    queries, keys, values, from_prefix, sums = (_padded(x).flatten(0, 1) for x in zip(*rows, strict=True))
    keys, results, last = _wide(keys).mT, [], 0
    for some, result, total in zip(*(x.split(PACKED_QUERIES, 2) for x in (queries, from_prefix, sums)), strict=True):
        first, last = last, last + some.shape[2]
        scores = torch.bmm(_wide(some).flatten(1, 2), keys[..., :last]).div_(LOG2_E)
        scores.unflatten(1, some.shape[1:3]).masked_fill_(_unseen(first, last, window), -torch.inf)
        weights = torch.softmax(torch.cat([scores, total.flatten(1, 2)], -1), -1)
        of_row = torch.bmm(weights[..., :-1].to(values.dtype), values[:, :last])
        results.append(torch.addcmul(of_row, weights[..., -1:], result.flatten(1, 2)).view_as(result))
    together = torch.cat(results, 2).to(values.dtype).unflatten(0, (len(rows), -1)).flatten(1, 2).transpose(1, 2)
    return torch.cat([row[: own.shape[-2]] for row, (_, own, *_) in zip(together, rows, strict=True)])


def _unseen(first: int, last: int, window: int | None) -> Tensor:
    """A mask of the keys after their query or too far before it: [last - first, last]."""
    distance = torch.arange(first, last)[:, None] - torch.arange(last)
    return (distance < 0) if window is None else (distance < 0) | (distance >= window)


def _padded(rows: tuple[Tensor, ...]) -> Tensor:
    """Rows [..., L, D] padded to the longest: [rows, ..., L, D]."""
    return pad_sequence([row.movedim(-2, 0) for row in rows], batch_first=True).movedim(1, -2)
