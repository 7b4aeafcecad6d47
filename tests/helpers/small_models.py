"""Small random models of a few families, and a frozen teacher over a model that is in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from opcd.modules import FrozenTeacher
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.trajectories import Trajectories, Trajectory

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "mistral, sliding window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=12)),
    "gemma3, both kinds of layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SMALL, sliding_window=12, sliding_window_pattern=2)
    ),
}
WITHOUT: dict[str, Callable[[], PreTrainedModel]] = {
    "mamba, recurrent": lambda: MambaForCausalLM(
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0)
    ),
    "falcon-h1, hybrid": lambda: FalconH1ForCausalLM(
        FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)
    ),
}


class Teaches(FrozenTeacher):
    """A frozen teacher over a model that is there already."""

    def __init__(self, model: PreTrainedModel, mode: str = "auto") -> None:
        super().__init__()
        self._model = model.eval()
        self.prefix = PrefixCache(mode)


def ids(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random tokens of the small models, a sequence for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 97, (length,), generator=generator) for length in lengths]


def packed_trajectories() -> Trajectories:
    """Nine rows: four of one context, three of another, one whose prompt leaves the prefix early, one of none."""
    one, two = (torch.cat([torch.tensor([96]), context]) for context in ids(29, 20, seed=1))  # 96: a BOS token
    queries, responses = ids(5, 9, 3, 7, 4, 6, 8, 5, 5, seed=2), ids(6, 1, 12, 4, 5, 9, 3, 7, 2, seed=3)
    prefixes = [one, two, one, two, one, one, two, one, ids(40, seed=4)[0]]
    heads = [*prefixes[:7], one[:20], ids(40, seed=5)[0]]
    prompts = [torch.cat([head, query]) for head, query in zip(heads, queries, strict=True)]
    views = zip(queries, prompts, prefixes, responses, strict=True)
    return Trajectories([Trajectory(*row) for row in views])
