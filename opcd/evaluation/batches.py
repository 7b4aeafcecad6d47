"""How many questions can be answered at once."""

import psutil
import torch
from transformers import PreTrainedModel

MOST = 256
SHARE = 0.5
"""Of the free memory; the estimate leaves out what an attention implementation takes for itself."""


def rows_that_fit(model: PreTrainedModel, tokens: int) -> int:
    """Rows of `tokens` (prompt and answer) whose keys, values, activations and logits fit into half the free memory."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = model.dtype.itemsize
    cache = 2 * config.num_hidden_layers * heads * width * element
    activations = 4 * (config.hidden_size + (getattr(config, "intermediate_size", None) or 4 * config.hidden_size))
    # The cache counts twice: it grows by copying.
    row = tokens * (2 * cache + activations * element) + 4 * config.vocab_size * 4
    return max(1, min(MOST, int(SHARE * _free_bytes(model.device) / row)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
