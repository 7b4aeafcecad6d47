"""Causal attention as a few products per block of queries, on a CPU.

Up to 512 tokens in 0.4 to 0.7 of the time of torch's kernel, at 2,048 in 0.9 (docs/log.md).

Keys that come after a block are never looked at. Scores and their softmax are in float32 (float64 for float64); what
is kept for the backward pass are queries, keys and values, and the probabilities are computed again, as in
FlashAttention (arXiv:2205.14135).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "opcd_cpu"
"""What transformers calls it."""

QUERIES = 64
"""Of a row at a time."""

SCORES = 2**21
"""Attention scores at a time: 8 MiB, which glibc keeps for the next ones."""

ROWS = "opcd_rows"
"""What a model hands on to its layers where rows share their beginning (`shared_rows.py`): how many rows and tokens."""


def use_cpu_attention(model: PreTrainedModel) -> None:
    """Let it stand in for SDPA wherever a pass on a CPU is causal, without mask, prefix or dropout.

    Models that do not take transformers' attention by its name keep their own: Falcon's would read another name than
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
    """As transformers calls it: [B, H, L, D], keys and values [B, G, K, D] -> [B, L, H, D].

    With `ROWS` in `others`, [1, H, N, D] of all rows, what they share first; the mask says nothing then.
    """
    if (shared := others.pop(ROWS, None)) is not None:
        query, key, value = (_whole(x, *shared) for x in (query, key, value))
        result, _ = attention(module, query, key, value, None, **others)
        return torch.cat([result[0, : shared[1]], result[:, shared[1] :].flatten(0, 1)])[None], None
    if not (attention_mask is None and query.device.type == "cpu" and _is_plain(module, query, key, others)):
        of_torch: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return of_torch
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    return causal_attention(query.to(dtype), key.to(dtype), value.to(dtype), others.get("scaling")), None


def _whole(x: Tensor, rows: int, shared: int) -> Tensor:
    """What they share, and what each has of its own, [1, H, shared + rows * L, D] -> [rows, H, shared + L, D]."""
    own = x[0, :, shared:].unflatten(1, (rows, -1)).transpose(0, 1)
    return torch.cat([x[:, :, :shared].expand(rows, -1, -1, -1), own], 2)


def _is_plain(module: Any, query: Tensor, key: Tensor, others: dict[str, Any]) -> bool:
    causal = others.get("is_causal")
    unknown = any(others.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    length = query.shape[2]
    plain = length > 1 and length == key.shape[2] and not others.get("dropout") and not unknown
    return plain and bool(getattr(module, "is_causal", True) if causal is None else causal)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """softmax(query keyᵀ * scale) value, where query i sees the keys up to K - L + i.

    Args:
        query: [B, H, L, D].
        key: [B, G, K, D], K >= L; H is a multiple of G, and neighbouring heads share keys.
        value: [B, G, K, E].
        scale: D ** -0.5 if None.

    Returns:
        [B, L, H, E], as transformers wants it, in the type of `value`. Differentiable once.
    """
    result: Tensor = _Causal.apply(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-untyped-call]
    return result


class _Causal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Some rows at a time."""
        ctx.save_for_backward(query, key, value)
        ctx.scale = scale
        with torch.autocast("cpu", enabled=False):
            return torch.cat([_forward(scale, *rows) for rows in _by_rows(query, key, value)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The same rows again."""
        query, key, value = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            gradients = [_backward(ctx.scale, *rows) for rows in _by_rows(query, key, value, gradient)]
        return *(torch.cat(rows) for rows in zip(*gradients, strict=True)), None


def _by_rows(query: Tensor, key: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    scores = query.shape[1] * min(QUERIES, query.shape[2]) * key.shape[2]
    return zip(*(x.split(max(1, SCORES // scores)) for x in (query, key, *others)), strict=True)


def _forward(scale: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[b, H, L, D], keys [b, G, K, D] -> [b, L, H, E]."""
    queries, keys, values = _scaled(query, key, scale), wide(key.flatten(0, 1)), value.flatten(0, 1)
    rows, heads, length, _ = query.shape
    result = value.new_empty(rows, length, heads, value.shape[-1])
    for block, seen in _blocks(query, key):
        likely = _probabilities(queries[:, :, block], keys[:, :seen]).to(value.dtype)
        result[:, block] = torch.bmm(likely, values[:, :seen]).view(rows, heads, -1, value.shape[-1]).transpose(1, 2)
    return result


def _backward(scale: float, query: Tensor, key: Tensor, value: Tensor, gradient: Tensor) -> tuple[Tensor, ...]:
    """The gradients of the three, from that of the result, [b, L, H, E]."""
    queries, keys, values = _scaled(query, key, scale), wide(key.flatten(0, 1)), value.flatten(0, 1)
    low_queries, gradient = queries.to(value.dtype), gradient.transpose(1, 2)
    # Gradients of scores sum to zero but for their rounding, which a bias on the keys (Qwen2's) would multiply.
    low_keys = (keys - keys.mean(1, keepdim=True)).to(value.dtype)
    of_queries, of_keys, of_values = (torch.zeros_like(x) for x in (low_queries, keys, wide(values)))
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
    """[N, h, n, D], scaled, and the keys that the last of them sees, [N, K, D] -> [N, h * n, K]."""
    count = queries.shape[2]
    scores = torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2))
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    scores.unflatten(1, (-1, count))[..., -count:].masked_fill_(later, -torch.inf)
    return torch.softmax(scores, -1, out=scores)  # every row is summed up before its first number is written


def _blocks(query: Tensor, key: Tensor) -> Iterator[tuple[slice, int]]:
    """Some queries, and how many keys the last of them sees."""
    length, before = query.shape[2], key.shape[2] - query.shape[2]
    for first in range(0, length, QUERIES):
        last = min(length, first + QUERIES)
        yield slice(first, last), before + last


def _scaled(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Heads that share keys together: [b, H, L, D] -> [b * G, H / G, L, D]."""
    return (wide(query) * scale).reshape(len(key) * key.shape[1], -1, *query.shape[2:])


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it is: what scores and their softmax are computed in. Any shape."""
    return x if x.dtype == torch.float64 else x.float()
