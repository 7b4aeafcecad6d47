"""How many rows are generated at a time, so that their keys and values fit into memory."""

import torch
from transformers import PreTrainedModel

MEMORY_SHARE = 0.5
"""Share of the free memory for the rows; the estimate leaves out the temporary memory of attention."""


def rows_that_fit(model: PreTrainedModel, tokens: int, free: int) -> int:
    """Rows of `tokens` (prompt and response) whose keys, values, activations and logits fit; at least 1.

    Args:
        model: generates the rows.
        tokens: of the longest row.
        free: bytes of free memory, of which `MEMORY_SHARE` is used.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    element = model.dtype.itemsize
    cache = 2 * config.num_hidden_layers * heads * width * element
    activations = 4 * (config.hidden_size + (getattr(config, "intermediate_size", None) or 4 * config.hidden_size))
    # The cache counts twice: it grows by copying.
    row = tokens * (2 * cache + activations * element) + 4 * config.vocab_size * 4
    return max(1, int(MEMORY_SHARE * free / row))


def free_of_gpu(device: torch.device) -> int:
    """Bytes that the process can still take on a GPU: free ones, and those that torch's allocator holds unused."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + held


def at_a_time(model: PreTrainedModel, rows: int, tokens: int, most: int | None = None) -> int:
    """Rows in each part of `rows`: `most`; if None, as many as fit into a GPU's free memory, or all on other devices.

    The parts are of nearly one size: 10 rows, of which 8 fit, are two times 5. A recurrent model has one part.
    """
    if most is None:
        if model.device.type != "cuda" or not hasattr(model.config.get_text_config(), "num_attention_heads"):
            return rows
        most = rows_that_fit(model, tokens, free_of_gpu(model.device))
    parts = -(-rows // most)
    return -(-rows // parts)
