"""Several rows packed into one, behind a prefix that all of them see."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from opcd.modules.decoding import CACHE
from opcd.modules.generation import EncodedPrefix, joined_cache
from opcd.modules.packed_attention import attends_by_rows, attention_by_rows

Mask = Tensor | BlockMask
Rule = Callable[[Tensor | None, Tensor | None, Tensor, Tensor], Tensor]
"""(batch, head, query, key), indices -> whether the query sees the key: a mask_mod of FlexAttention."""


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


@contextmanager
def packed_rows(model: PreTrainedModel, prefix: EncodedPrefix, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Within, a pass of the model takes Q packed tokens behind a prefix, with the arguments that this gives.

    Raises:
        ValueError: the model has layers that keep no keys and values.
    """
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))} keep no keys and values of each token")
    if attends_by_rows(model):
        with attention_by_rows(model, prefix.layers, lengths):
            yield {"use_cache": False}
    else:
        mask = packed_masks(model, len(prefix.ids), lengths)
        yield {"attention_mask": mask, "use_cache": True, CACHE: joined_cache([prefix])}


def packed_masks(model: PreTrainedModel, prefix: int, lengths: list[int]) -> Mask | dict[str, Mask]:
    """Who sees whom among Q packed tokens behind a prefix: every token the whole prefix and its own row's past.

    Layers with a sliding window see no further back than it, counted in positions of their own row. Models with more
    than one kind of layer get a mask for each kind. A mask is [1, 1, Q, prefix + Q] bool, or, for FlexAttention, a
    BlockMask, of which nothing of that size is ever made on a GPU.
    """
    config = model.config.get_text_config()
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(model.device)
    position = torch.cat([torch.arange(prefix, prefix + length) for length in lengths]).to(model.device)
    make = _block_mask if config._attn_implementation == "flex_attention" else _dense_mask
    sizes, window = (len(row), prefix + len(row), model.device), sliding_window(model)
    if window is None:
        return make(_rule(prefix, row, position), *sizes)
    near = make(_rule(prefix, row, position, window), *sizes)
    if len(set(getattr(config, "layer_types", None) or [])) < 2:
        return near
    return {"full_attention": make(_rule(prefix, row, position), *sizes), "sliding_attention": near}


def _rule(prefix: int, row: Tensor, position: Tensor, window: int | None = None) -> Rule:
    key_row = torch.cat([row.new_full((prefix,), -1), row])
    key_position = torch.cat([torch.arange(prefix, device=row.device), position])

    def seen(batch: Tensor | None, head: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
        """The prefix, and the query's own row up to itself."""
        distance = position[query] - key_position[key]
        past = ((key_row[key] < 0) | (key_row[key] == row[query])) & (distance >= 0)
        return past if window is None else past & (distance < window)

    return seen


def _dense_mask(seen: Rule, queries: int, keys: int, device: torch.device) -> Tensor:
    query, key = torch.arange(queries, device=device), torch.arange(keys, device=device)
    return seen(None, None, query[:, None], key[None, :])[None, None]


def _block_mask(seen: Rule, queries: int, keys: int, device: torch.device) -> BlockMask:
    # Compiled, it is made block by block; as it is, through the whole mask.
    create = torch.compile(create_block_mask) if device.type == "cuda" else create_block_mask
    blocks: BlockMask = create(seen, None, None, queries, keys, device=device)
    return blocks
