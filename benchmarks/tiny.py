"""A tiny model for tests and drills that run hundreds of times."""

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from opcd.models import ModelConfig, load_tokenizer


def make_tiny(folder: Path, hidden: int = 32, seed: int = 0, dropout: float = 0.0) -> Path:
    """A Llama of two layers and random weights with the packaged model's tokenizer, as a Hugging Face folder."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(ModelConfig())
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        attention_dropout=dropout,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        # Large enough that the distributions are far from uniform, so that tests of values mean something.
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
