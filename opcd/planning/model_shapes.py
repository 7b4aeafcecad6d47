"""The sizes of a decoder, read from its config.json: no weight is loaded."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from opcd.models import ModelConfig, architecture
from opcd.runtime.errors import UserError

NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in 4 bits: a scale of one byte for 64 of them, and one of four bytes for 256 scales."""


@dataclass(frozen=True)
class Shape:
    """How large a decoder is: layers of attention and a gated MLP, as in Llama, Qwen and their kin."""

    hidden: int
    intermediate: int
    """Numbers of a token between the two halves of an MLP; of all experts that it goes to."""
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    weights: int
    """All of them; what head and embedding share counts once."""
    linears: tuple[tuple[str, int, int], ...]
    """Last name, inputs and outputs of each linear layer but the head."""
    norms: int
    """Of a whole token, in a layer."""
    head_norms: bool
    """Whether queries and keys are normed head by head."""
    dtype: torch.dtype
    """Of the weights in their file."""
    masks: int = 1
    """Kinds of attention, each with a mask of its own: 2 where some layers have a sliding window."""

    @property
    def linear_weights(self) -> int:
        """Numbers in the linear layers but the head."""
        return sum(inputs * outputs for _, inputs, outputs in self.linears)

    @property
    def head(self) -> int:
        """Numbers of the head's matrix."""
        return self.vocabulary * self.hidden

    @property
    def tied(self) -> bool:
        """Whether embedding and head are one matrix."""
        return self.weights - self.linear_weights < 2 * self.head


@dataclass(frozen=True)
class Weights:
    """A model in memory."""

    shape: Shape
    dtype: torch.dtype
    quantization: str = "none"

    @property
    def bytes(self) -> int:
        """Of all weights; bitsandbytes leaves embedding, norms and head as they are."""
        shape, size = self.shape, self.dtype.itemsize
        if self.quantization == "none":
            return shape.weights * size
        rest = (shape.weights - shape.linear_weights) * size
        if self.quantization == "4bit":
            return rest + round(shape.linear_weights * NF4)
        return rest + shape.linear_weights + 4 * sum(outputs for _, _, outputs in shape.linears)

    def computing(self, autocast: torch.dtype | None) -> int:
        """Bytes of a number in its products."""
        return autocast.itemsize if autocast and self.dtype == torch.float32 else self.dtype.itemsize

    def token(self, autocast: torch.dtype | None) -> int:
        """Bytes of a token's keys and values: rotary frequencies, and so the keys, have the type of the weights."""
        shape = self.shape
        return shape.layers * shape.kv_heads * shape.head_dim * (self.dtype.itemsize + self.computing(autocast))


def shape_of(config: ModelConfig, key: str) -> Shape:
    """The shape of a model; a folder with a config.json and nothing else will do.

    Raises:
        UserError: the config cannot be had, or is no decoder's with attention.
    """
    whole = architecture(config, key)
    text = whole.get_text_config()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(whole, trust_remote_code=config.trust_remote_code)
        return _measured(text, model)
    except (ValueError, AttributeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{key}.name: no plan for {config.name} ({whole.model_type}): {reason}") from error


def _measured(text: PreTrainedConfig, model: nn.Module) -> Shape:
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = tuple((name, m.in_features, m.out_features) for name, m in _linears(model) if m is not head)
    first = [(name, weight) for name, weight in model.named_parameters() if ".layers.0." in name]
    experts = getattr(text, "num_experts_per_tok", None) or 0
    return Shape(
        hidden=text.hidden_size,
        intermediate=experts * getattr(text, "moe_intermediate_size", text.intermediate_size) or text.intermediate_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocabulary=text.vocab_size,
        weights=sum(weight.numel() for weight in model.parameters()),
        linears=linears,
        norms=sum(name.endswith("weight") and tuple(w.shape) == (text.hidden_size,) for name, w in first),
        head_norms=any(name.endswith("q_norm.weight") for name, _ in first),
        dtype=text.dtype if isinstance(text.dtype, torch.dtype) else torch.float32,
        masks=max(1, len(set(getattr(text, "layer_types", None) or []))),
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name.rpartition(".")[2], module
