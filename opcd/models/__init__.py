"""Models and tokenizers from a hub id, a folder, a GGUF file or the packaged default, read within bounds."""

from typing import TYPE_CHECKING

from opcd.runtime.lazy import lazily

if TYPE_CHECKING:
    from opcd.models.loading import load_model, load_tokenizer
    from opcd.models.model_source import (
        PACKAGED,
        ModelConfig,
        architecture,
        base_of,
        context_window,
        own_quantization,
        resolve,
        saved_model_config,
    )

__all__ = [
    "PACKAGED",
    "ModelConfig",
    "architecture",
    "base_of",
    "context_window",
    "load_model",
    "load_tokenizer",
    "own_quantization",
    "resolve",
    "saved_model_config",
]

__getattr__ = lazily(__name__)
