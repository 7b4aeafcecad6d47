"""Low-rank adapters (LoRA, arXiv:2106.09685) in a model whose own weights stay as they are, through peft.

The adapter is injected into the model itself, so that everything that takes the model takes it with its adapter. Base
and twin share the memory of the frozen weights.
"""

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from opcd.did_you_mean import did_you_mean
from opcd.errors import UserError

ALL_LINEAR = "all-linear"


@dataclass
class Lora:
    """A trained product of two narrow matrices beside each target's weight: W x + (alpha / rank) B A x."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """Scales the adapter's part by alpha / rank."""
    targets: list[str] | str = ALL_LINEAR
    """Last names of the linear layers that get one ([q_proj, v_proj]); all-linear takes all but the head."""
    head: bool = False
    """Whether the head gets one too."""
    dropout: float = 0.0
    """Share of the adapter's inputs that are dropped while training."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"Lora wants rank >= 1, alpha > 0 and 0 <= dropout < 1, got rank={self.rank}, alpha={self.alpha}, "
                f"dropout={self.dropout}"
            )
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"targets is {ALL_LINEAR} or a list of names, not {self.targets!r}")
        if not self.targets:
            raise ValueError("targets is empty: no layer would learn")


def add_lora(model: PreTrainedModel, lora: Lora, key: str = "model.adapter") -> None:
    """Freeze the model's weights and give the targets an adapter in float32 (float64 stays float64).

    Raises:
        UserError: a target that the model does not have.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # an int by its annotation; it is only divided
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora, key),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # `merged` unties the head
        inject_adapter_in_model(settings, model)
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def keep_differentiable(model: PreTrainedModel) -> None:
    """Have gradients go through 4-bit weights on a CPU; comes before the first pass.

    bitsandbytes repacks them at the first pass without gradient where the CPU has AVX-512 with bfloat16, and has no
    gradient through them from then on: it would be zero, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there is an adapter in the model."""
    return hasattr(model, "peft_config")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that learn, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model with copies of the weights that learn, and with the very weights that do not."""
    frozen: dict[int, object] = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():  # quantized weights: their scales are not parameters
        if (state := getattr(module, "quant_state", None)) is not None:
            frozen[id(state)] = state
    return copy.deepcopy(model, frozen)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights without the adapter; nothing is copied but the modules that hold them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = twin(model)
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer):
            base.set_submodule(name, module.get_base_layer())
    del base.peft_config
    return base


@torch.no_grad()
def merged(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in `dtype` whose weights hold the adapter, quantized ones dequantized first.

    Where an adapter on the head makes it differ from the embedding that it shares, the two are untied.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.integrations import dequantize_module_weight

    result = twin(model)
    embedding = model.get_input_embeddings().weight
    for name, module in list(result.named_modules()):
        adapted = isinstance(module, BaseTunerLayer)
        base = module.get_base_layer() if adapted else module
        if not isinstance(base, nn.Linear) or (type(base) is nn.Linear and not adapted):
            continue
        base.state_dict()  # has bitsandbytes undo what `keep_differentiable` is about, which the next line cannot read
        weight = dequantize_module_weight(base).float()
        if adapted:
            weight = weight + module.get_delta_weight(module.active_adapters[0]).float()
            if base.weight is embedding:
                result.config.get_text_config().tie_word_embeddings = result.config.tie_word_embeddings = False
        plain = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), base.bias
        result.set_submodule(name, plain)
    _forget_quantization(result)
    del result.peft_config
    # Not in place: what is not adapted is the model's own. Rotary frequencies stay in float32.
    for module in result.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    result.tie_weights()
    return result


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json, as peft's `PeftModel` does and reads."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
        folder / "adapter_model.safetensors",
        {"format": "pt"},
    )
    settings = copy.copy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = model.config.name_or_path, True
    settings.save_pretrained(str(folder))


def _forget_quantization(model: Any) -> None:
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None


def _targets(model: PreTrainedModel, lora: Lora, key: str) -> list[str]:
    head = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head_name = next(name for name, module in linears.items() if module is head)
    there = sorted({name.rpartition(".")[2] for name in linears if name != head_name})
    wanted = there if isinstance(lora.targets, str) else lora.targets
    for name in wanted:
        if name not in there:
            head_hint = "; the head has head: true" if name == head_name else did_you_mean(name, there)
            raise UserError(f"{key}.targets: no linear layer {name!r}; there are {', '.join(there)}{head_hint}")
    return [*wanted, *([head_name] if lora.head else [])]
