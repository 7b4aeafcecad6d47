"""Several rows packed into one, behind a prefix that all of them see."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

Mask = Tensor | BlockMask


def pack_groups(lengths: list[int], max_tokens: int) -> list[list[int]]:
    """Indices in groups whose lengths sum to at most `max_tokens`; a longer one is a group of its own."""
    groups: list[list[int]] = []
    total = 0
    for index, length in enumerate(lengths):
        if groups and total + length <= max_tokens:
            groups[-1].append(index)
            total += length
        else:
            groups.append([index])
            total = length
    return groups


def sliding_window(model: PreTrainedModel) -> int | None:
    """How many tokens a layer with a sliding window sees, its own included; None where no layer has one."""
    config = model.config.get_text_config()
    window: int | None = getattr(config, "sliding_window", None)
    return None if set(getattr(config, "layer_types", None) or []) == {"full_attention"} else window


def packed_masks(model: PreTrainedModel, prefix: int, lengths: list[int]) -> Mask | dict[str, Mask]:
    """Who sees whom among Q packed tokens behind a prefix: every token the whole prefix and its own row's past.

    Layers with a sliding window see no further back than it, counted in positions of their own row. Models with more
    than one kind of layer get a mask for each kind. A mask is [1, 1, Q, prefix + Q] bool, or, for FlexAttention, a
    BlockMask, of which nothing of that size is ever made on a GPU.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))} keep no keys and values of each token")
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(model.device)
    position = torch.cat([torch.arange(prefix, prefix + length) for length in lengths]).to(model.device)
    make = _block_mask if config._attn_implementation == "flex_attention" else _dense_mask
    full, window = make(_rule(prefix, row, position)), sliding_window(model)
    if window is None:
        return full
    near = make(_rule(prefix, row, position, window))
    return {"full_attention": full, "sliding_attention": near} if len(kinds) > 1 else near


@dataclass
class _Rule:
    """Whether a query sees a key, by their indices among `queries` and `keys`."""

    seen: Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
    queries: int
    keys: int
    device: torch.device


def _rule(prefix: int, row: Tensor, position: Tensor, window: int | None = None) -> _Rule:
    key_row = torch.cat([row.new_full((prefix,), -1), row])
    key_position = torch.cat([torch.arange(prefix, device=row.device), position])

    def seen(batch: Tensor | None, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        distance = position[query] - key_position[key]
        past = ((key_row[key] < 0) | (key_row[key] == row[query])) & (distance >= 0)
        return past if window is None else past & (distance < window)

    return _Rule(seen, len(row), prefix + len(row), row.device)


def _dense_mask(rule: _Rule) -> Tensor:
    queries, keys = (torch.arange(n, device=rule.device) for n in (rule.queries, rule.keys))
    return rule.seen(None, None, queries[:, None], keys[None, :])[None, None]


def _block_mask(rule: _Rule) -> BlockMask:
    # Compiled, it is made block by block; as it is, through the whole mask.
    create = torch.compile(create_block_mask) if rule.device.type == "cuda" else create_block_mask
    blocks: BlockMask = create(rule.seen, None, None, rule.queries, rule.keys, device=rule.device)
    return blocks
