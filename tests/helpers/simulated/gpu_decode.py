"""Kernels and syncs of a decoded token on the simulated GPU: Qwen3-1.7B's 28 layers, narrow, by `opcd`'s generation.

python -m tests.helpers.simulated.gpu_decode
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from opcd.modules.lm.generation import Sampling, generate
from tests.helpers.simulated.gpu_device import DEVICE, Counts, OnDevice, count, counted

PLAIN = nn.functional.scaled_dot_product_attention


def one_kernel(*tensors: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """The attention as a GPU has it: one kernel, where the simulated device has the plain operations."""
    count(nn.functional.scaled_dot_product_attention.__name__)
    mask = attn_mask.inner if isinstance(attn_mask, OnDevice) else None
    return OnDevice(PLAIN(*(x.inner for x in tensors if isinstance(x, OnDevice)), attn_mask=mask, **options))


def counts_of(model: Qwen3ForCausalLM, tokens: int) -> Counts:
    """What two rows of so many tokens take."""
    prompts = [torch.arange(3, 3 + length).to(DEVICE) for length in (7, 9)]
    with counted() as counts:
        generate(model, prompts, Sampling(tokens, options={"min_new_tokens": tokens}), {2}, 2)
    return counts


def main() -> None:
    """Print the counts of a token, from the difference of 16 tokens."""
    nn.functional.scaled_dot_product_attention = one_kernel
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, num_hidden_layers=28, head_dim=8, vocab_size=100, eos_token_id=2, pad_token_id=2)
    model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).eval().to(DEVICE)
    few, many = counts_of(model, 4), counts_of(model, 20)
    kernels, syncs = (
        (after - before).total() / 16 for after, before in ((many.kernels, few.kernels), (many.syncs, few.syncs))
    )
    print(f"{kernels:.1f} kernels and {syncs:.2f} syncs a token; {dict(many.syncs - few.syncs)} in 16 tokens")


if __name__ == "__main__":
    main()
