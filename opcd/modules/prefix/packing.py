"""Several rows packed into one, behind a common prefix."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.accel import accelerator
from opcd.models.key_value_prefix import CACHE
from opcd.modules.lm.generation import EncodedPrefix, joined_cache
from opcd.modules.lm.layer_kinds import layer_kinds, sliding_window

Rule = Callable[[Tensor, Tensor], Tensor]
"""Indices of queries and keys -> whether the query sees the key."""

RECURRENT = {"linear_attention", "mamba", "mamba2", "conv", "recurrent"}
"""The kinds of layers (`layer_types`) that keep a state instead of keys and values."""


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


def cannot_pack(model: PreTrainedModel) -> str | None:
    """The reason why this model cannot take rows packed behind a prefix; None if its config gives no such reason."""
    kinds = layer_kinds(model)
    if model._is_stateful or kinds & RECURRENT:
        return "it has recurrent layers, which keep a state and no keys and values of each token"
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        return f"its layers of the kind {', '.join(sorted(unknown))} need masks that opcd does not make"
    device = accelerator(model.device)
    if not device.packs_rows(model) and (name := device.mask_name(model)) not in MASKS:
        return f"attention {name} takes no mask of packed rows; set attention to sdpa or eager"
    return None


@contextmanager
def packed_rows(model: PreTrainedModel, prefix: EncodedPrefix, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """Within, the model can run Q packed tokens behind a prefix, with the arguments that this yields."""
    device = accelerator(model.device)
    if device.packs_rows(model):
        with device.packed_attention(model, prefix.layers, lengths):
            yield {"use_cache": False}
    else:
        mask = packed_masks(model, len(prefix.ids), lengths)
        yield {"attention_mask": mask, "use_cache": True, CACHE: joined_cache([prefix])}


def packed_masks(model: PreTrainedModel, prefix: int, lengths: list[int]) -> Tensor | dict[str, Tensor]:
    """The mask of Q packed tokens behind a prefix: every token sees the prefix and the past of its own row.

    Only models whose attention cannot be replaced need it (`packs_rows`). Sliding-window layers see no further back
    than their window, counted in positions of the row. Models with more than one kind of layer get one mask per kind.
    A mask is [1, 1, Q, prefix + Q]: bool; or, for eager attention, 0 and the type's lowest number, to be added to
    scores.

    Raises:
        ValueError: the model's attention takes no such mask.
    """
    name = accelerator(model.device).mask_name(model)
    if name not in MASKS:
        raise ValueError(f"attention {name} takes no mask of packed rows")
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(model.device)
    position = torch.cat([torch.arange(prefix, prefix + length) for length in lengths]).to(model.device)

    def make(window: int | None = None) -> Tensor:
        return MASKS[name](_rule(prefix, row, position, window), len(row), prefix + len(row), model)

    if (window := sliding_window(model)) is None:
        return make()
    if len(layer_kinds(model)) < 2:
        return make(window)
    return {"full_attention": make(), "sliding_attention": make(window)}


def _rule(prefix: int, row: Tensor, position: Tensor, window: int | None) -> Rule:
    key_row = torch.cat([row.new_full((prefix,), -1), row])
    key_position = torch.cat([torch.arange(prefix, device=row.device), position])

    def seen(query: Tensor, key: Tensor) -> Tensor:
        """The prefix, and the query's own row up to itself.

        Only comparisons have the size of all pairs: 3 bytes each at most (`planning/sizes.py`).
        """
        past = ((key_row[key] < 0) | (key_row[key] == row[query])) & (key_position[key] <= position[query])
        return past if window is None else past & (key_position[key] > position[query] - window)

    return seen


def _dense_mask(seen: Rule, queries: int, keys: int, model: PreTrainedModel) -> Tensor:
    query, key = torch.arange(queries, device=model.device), torch.arange(keys, device=model.device)
    return seen(query[:, None], key[None, :])[None, None]


def _added_mask(seen: Rule, queries: int, keys: int, model: PreTrainedModel) -> Tensor:
    # As transformers' eager_mask: a bool mask would be added to the scores as 0 and 1.
    mask, low = _dense_mask(seen, queries, keys, model), torch.finfo(model.dtype).min
    return torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill_(mask.logical_not_(), low)


MASKS: dict[str, Callable[[Rule, int, int, PreTrainedModel], Tensor]] = {"sdpa": _dense_mask, "eager": _added_mask}
"""How the mask is made, by the name of the attention that takes it. FlashAttention takes no mask of all pairs: it would
read it as padding, and on a GPU every later call of the process would fail."""
