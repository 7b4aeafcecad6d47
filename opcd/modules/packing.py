"""Several rows packed into one, behind a prefix that all of them see."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


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


def packed_masks(model: PreTrainedModel, prefix: int, lengths: list[int]) -> Tensor | dict[str, Tensor]:
    """Who sees whom, [1, 1, Q, prefix + Q] bool: every token sees the whole prefix and its own row's past.

    Layers with a sliding window see no further back than it, counted in positions of their own row. Models with more
    than one kind of layer get a mask for each kind.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    if unknown := kinds - {"full_attention", "sliding_attention"}:
        raise ValueError(f"layers of kind {', '.join(sorted(unknown))} keep no keys and values of each token")
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    position = torch.cat([torch.arange(length) for length in lengths]) + prefix
    own = (row[:, None] == row[None, :]) & (position[:, None] >= position[None, :])
    full = torch.cat([torch.ones(len(row), prefix, dtype=torch.bool), own], dim=1)[None, None].to(model.device)
    window = sliding_window(model)
    if window is None:
        return full
    keys = torch.cat([torch.arange(prefix), position])
    near = full & (position[:, None] - keys[None, :] < window).to(model.device)
    return {"full_attention": full, "sliding_attention": near} if len(kinds) > 1 else near
