"""Adapters in a model with frozen weights, through peft: low-rank ones (LoRA, arXiv:2106.09685), and what all share.

An adapter is a part of the model itself, so that all code that takes a model works with its adapter. Copies of the
model share the memory of the frozen weights. The other adapter is a prefix (`cartridge.py`).
"""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from opcd.models.adapter_folder import PROMPT
from opcd.models.key_value_prefix import detach_prefix, prefix_of
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError

ALL_LINEAR = "all-linear"
NOT_MERGED = (
    "a Cartridge is keys and values that the model reads, and cannot be merged into its weights; keep it as an "
    "adapter, which peft and opcd load (opcd export RUN --to hf)"
)


@dataclass
class Lora:
    """A trained product of two low-rank matrices beside each target's weight: W x + (alpha / rank) B A x."""

    rank: int = 16
    """Rows of A and columns of B."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    targets: list[str] | str = ALL_LINEAR
    """Last names of the linear layers to adapt ([q_proj, v_proj]); all-linear: all layers but the head."""
    head: bool = False
    """Adapt the head too."""
    dropout: float = 0.0
    """Dropout probability of the adapter's inputs in training."""

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"Lora needs rank >= 1, alpha > 0 and 0 <= dropout < 1, got rank={self.rank}, alpha={self.alpha}, "
                f"dropout={self.dropout}"
            )
        if isinstance(self.targets, str) and self.targets != ALL_LINEAR:
            raise ValueError(f"targets must be {ALL_LINEAR} or a list of names, got {self.targets!r}")
        if not self.targets:
            raise ValueError("targets is empty: no layer would be trained")


def add_lora(model: PreTrainedModel, lora: Lora, key: str = "model.adapter") -> None:
    """Freeze the model's weights and add an adapter to the targets, in float32 (float64 stays float64).

    Raises:
        UserError: the model has an adapter already, a target does not exist, or peft cannot adapt it.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if has_adapter(model):
        raise UserError(second_adapter(key, str(model.config.name_or_path)))
    model.requires_grad_(False)
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # annotated as an int; peft only divides it
        lora_dropout=lora.dropout,
        target_modules=_targets(model, lora, key),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # `merged` unties the head
        # From peft's own patterns for the parameters of experts, for which it expects modules.
        warnings.filterwarnings("ignore", ".*(rank|alpha)_pattern keys did not match.*")
        try:
            inject_adapter_in_model(settings, model)
        except ValueError as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"{key}: peft cannot adapt {type(model).__name__} like this: {why}") from error
    for parameter in trainable(model).values():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def second_adapter(key: str, student: str) -> str:
    """The message for an adapter over an adapter, of which only the new one would be saved."""
    return (
        f"{key}: model.student.name: {student} is an adapter itself, and another one over it would be saved without "
        f"it. Merge it first (opcd export {student} --to merged --out FOLDER) and set model.student.name to FOLDER; a "
        "Cartridge cannot be merged: name its base"
    )


def keep_differentiable(model: PreTrainedModel) -> None:
    """Keep 4-bit weights on a CPU differentiable; must be called before the first pass.

    On a CPU with AVX512-BF16, bitsandbytes repacks them in the first pass without gradient. From then on, gradients
    through them would silently be zero.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether the model has an adapter."""
    return hasattr(model, "peft_config")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable weights by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model with copies of the trainable weights; frozen weights are shared."""
    frozen: dict[int, object] = {id(p): p for p in model.parameters() if not p.requires_grad}
    for module in model.modules():  # quantized weights: their scales are not parameters
        if (state := getattr(module, "quant_state", None)) is not None:
            frozen[id(state)] = state
    for module in model.modules():  # what a recurrent layer keeps of its last pass may be part of a gradient graph
        frozen |= {id(x): x.detach() for x in vars(module).values() if isinstance(x, Tensor) and x.grad_fn is not None}
    return copy.deepcopy(model, frozen)


def without_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its adapter; all weights are shared, only the modules are copied."""
    base = twin(model)
    if prefix_of(base) is not None:
        detach_prefix(base)
        return base
    for name, layer in list(_adapted(base)):
        base.set_submodule(name, layer.get_base_layer())
    del base.peft_config
    return base


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The model's layers with an adapter by name; of nested ones (the parameters of fused experts) the outermost."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper  # fully trained layers in other people's adapters

    outer = None
    for name, module in model.named_modules():
        if outer is not None and name.startswith(f"{outer}."):
            continue
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            outer = name
            yield name, module


@torch.no_grad()
def merged(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy in `dtype` with the adapter merged into its weights; quantized weights are dequantized first.

    A head that is tied to the embedding, and has an adapter, is untied.

    Raises:
        UserError: the weights are quantized by another library than bitsandbytes, or the adapter is a Cartridge.
    """
    if prefix_of(model) is not None:
        raise UserError(NOT_MERGED)
    if (library := _library(model)) not in (None, "bitsandbytes"):
        raise UserError(f"no adapter can be merged into weights that {library} has quantized; keep it as an adapter")
    result = twin(model)
    embedding = model.get_input_embeddings().weight
    for name, layer in list(_adapted(result)):
        if any(weight is embedding for weight in layer.parameters()):
            result.config.get_text_config().tie_word_embeddings = result.config.tie_word_embeddings = False
        result.set_submodule(name, _merged_layer(layer))
    for name, module in list(result.named_modules()):
        if _is_quantized(module):
            result.set_submodule(name, _plain(module, _dequantized(module)))
    if hasattr(result.config, "quantization_config"):
        del result.config.quantization_config
        result.is_quantized, result.hf_quantizer = False, None  # type: ignore[assignment]
    del result.peft_config
    # Not in place: layers without an adapter are shared with the model. Rotary frequencies stay in float32.
    for module in result.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.to(dtype), requires_grad=False))
    result.tie_weights()
    return result


def _merged_layer(layer: Any) -> nn.Module:
    """A plain layer with the adapter merged in; its weights are new, in float32 or float64."""
    if hasattr(layer, "get_base_layer") and _is_quantized(base := layer.get_base_layer()):
        return _plain(base, _dequantized(base) + layer.get_delta_weight(layer.active_adapters[0]).float())
    for module in layer.modules():  # peft merges in place, but the weights are shared with the model
        for name, weight in list(module.named_parameters(recurse=False)):
            wide = torch.promote_types(weight.dtype, torch.float32)
            setattr(module, name, nn.Parameter(weight.to(wide, copy=True), requires_grad=False))
    plain: nn.Module
    if hasattr(layer, "unload_and_optionally_merge_module"):
        plain = layer.unload_and_optionally_merge_module(merge=True, safe_merge=False, adapter_names=None)
    else:
        layer.merge()
        plain = layer.get_base_layer()
    return plain


def _library(model: PreTrainedModel) -> str | None:
    """The library that has quantized the model's weights, as its config names it."""
    found: Any = getattr(model.config, "quantization_config", None)
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def _is_quantized(module: nn.Module) -> bool:
    """Whether a linear layer has weights of bitsandbytes, in 4 or 8 bits."""
    return isinstance(module, nn.Linear) and type(module).__module__.startswith("bitsandbytes.")


def _dequantized(module: Any) -> Tensor:
    from peft.utils.integrations import dequantize_module_weight

    module.state_dict()  # lets bitsandbytes undo the repacking (`keep_differentiable`), which peft cannot read
    return dequantize_module_weight(module).float()


def _plain(module: Any, weight: Tensor) -> nn.Linear:
    """The same layer as an `nn.Linear`, with another weight."""
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), module.bias
    return plain


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write adapter_model.safetensors and adapter_config.json in the format of peft's `PeftModel`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    if (prefix := prefix_of(model)) is not None:
        weights = {PROMPT: prefix.weight.detach().contiguous()}
    else:
        found = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {f"base_model.model.{name}": weight.contiguous() for name, weight in found.items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    settings = copy.copy(model.peft_config["default"])
    settings.base_model_name_or_path, settings.inference_mode = model.config.name_or_path, True
    settings.save_pretrained(str(folder))


def _outside(model: PreTrainedModel) -> list[str]:
    """Linear layers, and modules that hold some, outside the text model and its head: those of an image encoder, which
    no text reaches, so that an adapter would not be trained."""
    text = model.get_decoder()
    inside = {id(module) for module in text.modules()} | {id(model.get_output_embeddings())}
    above = [name for name, module in model.named_modules() if module is text]
    return [
        name
        for name, module in model.named_modules()
        if id(module) not in inside
        and isinstance(module, nn.Linear | nn.MultiheadAttention)
        and not any(part.startswith(f"{name}.") for part in above)
    ]


def _targets(model: PreTrainedModel, lora: Lora, key: str) -> list[str]:
    """The modules that peft adapts: last names of linear layers, or full names if other modules share the last name."""
    head = model.get_output_embeddings()
    outside = set(_outside(model))
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in outside}
    head_name = next((name for name, module in linears.items() if module is head), None)
    unusual = _unusual(model, linears)
    layers: dict[str, set[str]] = {}
    for name in linears.keys() - unusual - {head_name}:
        layers.setdefault(_last(name), set()).add(name)
    there = sorted(layers)
    wanted = there if isinstance(lora.targets, str) else lora.targets
    for name in wanted:
        if name not in layers:
            hint = did_you_mean(name, there)
            if head_name is not None and name == _last(head_name):
                hint = "; set head: true to adapt the head"
            elif name in map(_last, unusual):
                hint = "; the model does not call this layer as a linear layer"
            raise UserError(f"{key}.targets: no linear layer {name!r}; there are {', '.join(there) or 'none'}{hint}")
    if not wanted:
        raise UserError(f"{key}: {type(model).__name__} has no linear layers to adapt; remove model.adapter")
    if lora.head and head_name is None:
        raise UserError(f"{key}.head: the head of {type(model).__name__} is not a linear layer; remove it")
    chosen: list[str] = [head_name] if lora.head and head_name is not None else []
    for last in wanted:
        of_name = {name for name, _ in model.named_modules() if _last(name) == last}
        chosen += [last] if of_name == layers[last] else sorted(layers[last])
    return chosen


@torch.no_grad()
def _unusual(model: PreTrainedModel, linears: dict[str, nn.Linear]) -> set[str]:
    """Names of linear layers that are not called (Mamba's dt_proj, whose weight is read), or that return more than one
    tensor (routers): an adapter there would be skipped, or break the pass.

    An expert without any of the two tokens is not called either, but neither is the module that holds its layers.
    """
    called: set[str] = set()
    unusual: set[str] = set()

    def note(name: str, result: object) -> None:
        called.add(name)
        if name in linears and not isinstance(result, Tensor):
            unusual.add(name)

    hooks = [
        module.register_forward_hook(lambda _, __, result, name=name: note(name, result))
        for name, module in model.named_modules()
    ]
    try:
        model(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return unusual | {name for name in linears if name not in called and name.rpartition(".")[0] in called}


def _last(name: str) -> str:
    return name.rpartition(".")[2]
