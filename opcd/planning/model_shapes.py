"""The sizes of a model, counted on meta tensors from its config.json, without its weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, PreTrainedModel

from opcd.accel import accelerator
from opcd.models import ModelConfig, architecture
from opcd.models.key_value_prefix import NAME
from opcd.modules.lm.adapters import ALL_LINEAR, Lora, trainable
from opcd.modules.lm.cartridge import Cartridge
from opcd.modules.lm.layer_kinds import sliding_window
from opcd.runtime.errors import UserError

QUANTIZED = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0}
"""Bytes of a weight. NF4 has a scale of one byte for 64 weights, and one of four bytes for 256 scales."""
TOKENS = 127
"""Tokens of the counted pass. A prime, which divides the size of tensors over tokens and hardly any other."""
ATTENTION = "opcd_plan"
PRODUCTS = {
    *(functional.linear, torch.conv1d, functional.grouped_mm, torch._grouped_mm, torch.einsum, torch.addmm),
    *(torch.matmul, torch.mm, torch.bmm, torch.baddbmm, functional.scaled_dot_product_attention),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.baddbmm),
}
"""Functions of language models that autocast computes in the short type."""


@dataclass(frozen=True)
class Model:
    """A model in memory. Sizes count numbers, or bytes if the name says so."""

    dtype: torch.dtype
    weights: int  # without the adapter's; weights shared by head and embedding count once
    linear: int  # weights of linear layers without the head
    head: int
    vocabulary: int
    layers: int
    hidden: int
    keys: int  # of a token, in all layers; there are as many values
    computing: int  # bytes of a number in matrix products
    adapter: int = 0  # weights of the adapter, in float32
    kept_bytes: float = 0.0  # kept by autograd for a token, in all layers
    casts_bytes: int = 0  # low-precision copies of weights that autocast keeps
    windows: bool = False  # whether some layers have a sliding window
    masks: int = 0  # masks of all pairs that packed rows need; 2 where some layers have a sliding window
    quantization: str = "none"

    @property
    def bytes(self) -> int:
        """Bytes of all weights. bitsandbytes does not quantize embedding, norms and head."""
        size = self.dtype.itemsize
        linear = QUANTIZED.get(self.quantization, size) * self.linear
        return round(size * (self.weights - self.linear) + linear) + 4 * self.adapter

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of a student's trainable weights."""
        return 4 * self.adapter or self.dtype.itemsize * self.weights

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values. Keys have the type of the weights, as rotary frequencies do."""
        return self.keys * (self.dtype.itemsize + self.computing)


def build(
    config: ModelConfig, key: str, dtype: torch.dtype, adapter: Lora | Cartridge | None = None
) -> PreTrainedModel:
    """Build a model on the meta device, with its adapter. UserError if it is no causal language model."""
    whole = architecture(config, key)
    try:
        with torch.device("meta"):
            options = {"dtype": dtype, "trust_remote_code": config.trust_remote_code}
            model: PreTrainedModel = AutoModelForCausalLM.from_config(whole, **options)
    except (ValueError, AttributeError, TypeError) as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"{key}.name: --plan does not support {config.name} ({whole.model_type}): {why}") from error
    if isinstance(adapter, Cartridge):
        model.requires_grad_(False)
        with torch.device("meta"):  # counted, and not read by the pass: `measured` has the size of a token
            numbers = nn.Parameter(torch.empty(adapter.num_virtual_tokens, 2 * measured(model).keys))
        model.base_model.add_module(NAME, nn.ParameterList([numbers]))
    elif adapter is not None:  # `add_lora` would run the model, to find linear layers that are never called
        from peft import LoraConfig, inject_adapter_in_model

        linear = {name.rpartition(".")[2]: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        head = model.get_output_embeddings()
        every = adapter.targets == ALL_LINEAR
        targets = [n for n, m in linear.items() if (adapter.head if m is head else every or n in adapter.targets)]
        model.requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=adapter.rank, target_modules=targets), model)
        for weight in trainable(model).values():
            weight.data = weight.data.float()
    model.train()
    return model


def measured(model: PreTrainedModel, autocast: torch.dtype | None = None, quantization: str = "none") -> Model:
    """The sizes of a model of `build`, without the bytes that autograd keeps."""
    text, head, dtype = model.config.get_text_config(), model.get_output_embeddings(), model.dtype
    adapter = sum(weight.numel() for name, weight in model.named_parameters() if _added(name))
    linear = (m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name)
    heads = getattr(text, "num_attention_heads", 0)  # a recurrent model has none
    size = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    computing = autocast.itemsize if autocast and dtype == torch.float32 else dtype.itemsize
    kinds = len(set(getattr(text, "layer_types", None) or ["full"]))
    return Model(
        dtype=dtype,
        weights=sum(weight.numel() for weight in model.parameters()) - adapter,
        linear=sum(m.weight.numel() for m in linear if getattr(m, "base_layer", m) is not head),
        head=text.vocab_size * text.hidden_size,
        vocabulary=text.vocab_size,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        keys=text.num_hidden_layers * (getattr(text, "num_key_value_heads", None) or heads) * size,
        computing=computing,
        adapter=adapter,
        windows=sliding_window(model) is not None,
        masks=0 if accelerator(model.device).packs_rows(model) else kinds,
        quantization=quantization,
    )


def _added(name: str) -> bool:
    """Whether a weight is an adapter's."""
    return "lora_" in name or f".{NAME}." in name


def kept_by_autograd(model: PreTrainedModel, autocast: torch.dtype | None) -> tuple[float, int]:
    """Bytes that autograd keeps in a forward pass: for each token, and for casts of weights.

    Raises:
        Exception: the pass depends on values, which meta tensors do not have.
    """
    kept: dict[int, Tensor] = {}  # by storage; the tensors stay alive, so that no address serves twice
    if model._supports_attention_backend:
        model.config.get_text_config()._attn_implementation = ATTENTION

    def storage(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.setdefault(storage(x), x), lambda x: x)
    with torch.device("meta"), hooks, _Autocast(autocast):
        model.base_model(input_ids=torch.zeros(1, TOKENS, dtype=torch.long), use_cache=False)
    own = {storage(weight) for weight in model.parameters()}
    sizes = [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own]
    of_tokens = sum(size for size in sizes if size % TOKENS == 0)
    return of_tokens / TOKENS, sum(sizes) - of_tokens


class _Autocast(TorchFunctionMode):
    """The casts of torch.autocast, which does not support meta tensors. Comparisons of values are true."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Cast the arguments of products."""
        if function is Tensor.__bool__:
            return True
        if self.dtype is not None and function in PRODUCTS:
            cast = {torch.float32: self.dtype}
            args, kwargs = tree_map_only(Tensor, lambda x: x.to(cast.get(x.dtype, x.dtype)), (args, kwargs))
        return function(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """An attention that keeps the tensors that FlashAttention keeps, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[B, H, T, D] for the query, fewer heads for key and value -> [B, T, H, D]."""
        rows, heads, tokens, _ = query.shape
        result = value.new_empty(rows, tokens, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, result, query.new_empty(rows, heads, tokens, dtype=torch.float32))
        return result


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """The attention function for transformers. It casts queries and keys as autocast does for torch's kernel."""
    return _Attention.apply(query.to(value.dtype), key.to(value.dtype), value), None  # type: ignore[no-untyped-call]


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, lambda *args, **options: None)
