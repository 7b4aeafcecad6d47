"""The settings of an adapter's folder (LoRA, Cartridge), checked against its weights before peft reads them.

peft takes patterns of names as regular expressions, which can take exponential time, and some of its settings import
a module or open further files. Here the layers are those that the weights name, and only known settings are passed on.
"""

import re
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from opcd.models.model_folder import is_integer, kind, read_object, shapes
from opcd.runtime.errors import UserError

ADAPTER = "adapter_config.json"
"""The file of peft that makes a folder an adapter's."""
WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
PROMPT = "prompt_embeddings"
"""The name of a Cartridge's weights, [P, layers * 2 * token_dim]."""
LAYER = re.compile(r"(?:base_model\.model\.)?(.+?)(?:\.base_layer)*\.lora_(?:A\.weight|embedding_A)")
PLAIN = re.compile(r"[\w.\\^$-]{1,500}")
"""A name, or a pattern that is matched in linear time."""
PATTERN = re.compile(r"(?:\.\*\\\.)?" + PLAIN.pattern)
"""A pattern that may begin with any parents, as peft writes those of fused experts: quadratic time in a short name."""
INITIAL = re.compile(r"gaussian|orthogonal|olora|eva|loftq|pissa(_niter_\d{1,2})?")
PASSED_OVER = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "loftq_config", "megatron_core", "peft_type"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config"),
}
"""Settings without an effect where an adapter is only loaded."""


def _positive(value: object) -> bool:
    return is_integer(value) and value > 0  # type: ignore[operator]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**31


def _plain(value: object) -> bool:
    return isinstance(value, str) and PLAIN.fullmatch(value) is not None


def _flag(value: object) -> bool:
    return isinstance(value, bool)


def _list_of(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _by_name(value: object, check: Callable[[object], bool]) -> bool:
    return isinstance(value, dict) and all(PATTERN.fullmatch(name) and check(each) for name, each in value.items())


def _names(value: object) -> bool:
    return _list_of(value, _plain)


def _integers(value: object) -> bool:
    return _list_of(value, is_integer)


CARTRIDGE: dict[str, tuple[Callable[[Any], bool], str]] = {
    "task_type": (lambda v: v == "CAUSAL_LM", "CAUSAL_LM"),
    "num_frozen_tokens": (lambda v: is_integer(v) and v >= 0, "an integer, 0 or greater"),
    "num_transformer_submodules": (lambda v: v == 1, "1"),
    **dict.fromkeys(
        ("num_virtual_tokens", "token_dim", "num_attention_heads", "num_layers"),
        (_positive, "an integer greater than 0"),
    ),
}
"""Settings of a Cartridge, all needed: the check of a value, and what the value must be in words."""
KNOWN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_positive, "an integer greater than 0"),
    "lora_alpha": (_number, "a number"),
    "lora_dropout": (lambda v: _number(v) and v < 1, "a number below 1"),
    "target_modules": (lambda v: isinstance(v, str) or _names(v), "a text or a list of names"),
    "exclude_modules": (_names, "a list of names"),
    "modules_to_save": (_names, "a list of names"),
    "target_parameters": (_names, "a list of names"),
    "layers_pattern": (lambda v: _plain(v) or _names(v), "a list of names"),
    "layers_to_transform": (lambda v: is_integer(v) or _integers(v), "a list of integers"),
    "rank_pattern": (lambda v: _by_name(v, _positive), "ranks by plain names"),
    "alpha_pattern": (lambda v: _by_name(v, _number), "numbers by plain names"),
    "trainable_token_indices": (lambda v: _integers(v) or _by_name(v, _integers), "lists of token ids"),
    "bias": (lambda v: v in ("none", "all", "lora_only"), "none, all or lora_only"),
    "init_lora_weights": (lambda v: _flag(v) or (isinstance(v, str) and bool(INITIAL.fullmatch(v))), "a known method"),
    "task_type": (lambda v: v == "CAUSAL_LM", "CAUSAL_LM"),
    **dict.fromkeys(
        ("fan_in_fan_out", "use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"), (_flag, "true or false")
    ),
}
"""Settings of a LoRA that are passed on to peft: the check of a value, and what the value must be in words."""


def base_name(folder: Path, key: str) -> str:
    """Read the name of an adapter's base model from its folder.

    Raises:
        UserError: the folder does not name it.
    """
    base = read_object(folder / ADAPTER, key).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or "\0" in base:
        raise UserError(
            f"{key}.name: {folder / ADAPTER} does not name its base model: base_model_name_or_path is {kind(base)}"
        )
    return base


def virtual_tokens(folder: Path, key: str) -> int:
    """Read how many tokens the prefix of a Cartridge's folder has; 0: it is another adapter."""
    values = read_object(folder / ADAPTER, key)
    if values.get("peft_type") != "CARTRIDGE":
        return 0
    tokens: Any = values.get("num_virtual_tokens")
    if not _positive(tokens):
        raise UserError(f"{key}.name: {folder / ADAPTER}: num_virtual_tokens must be an integer greater than 0")
    return int(tokens)


def cartridge_settings(folder: Path, key: str, pickled: bool, remedy: str) -> dict[str, Any]:
    """Read the arguments of peft's `CartridgeConfig` from an adapter's folder; arguments as for `lora_settings`.

    Raises:
        UserError: a setting is wrong, missing or unknown, or the weights do not fit the settings.
    """
    where = f"{key}.name: {folder / ADAPTER}"
    values = read_object(folder / ADAPTER, key)
    for name, (right, called) in CARTRIDGE.items():
        if not right(values.get(name)):
            raise UserError(f"{where}: {name} must be {called}, not {values.get(name)!r:.60}")
    settings = {name: values[name] for name in CARTRIDGE}
    _refuse_unknown(values, settings, where)
    tokens, width, heads = (settings[name] for name in ("num_virtual_tokens", "token_dim", "num_attention_heads"))
    shape, found = [tokens, 2 * settings["num_layers"] * width], _weights(folder, key, pickled, remedy)
    if found != {PROMPT: shape} or width % heads or settings["num_frozen_tokens"] > tokens:
        raise UserError(f"{where} describes {PROMPT} of {shape} in {heads} heads, and {folder} holds {found!s:.200}")
    return settings


def _refuse_unknown(values: dict[str, Any], known: Container[str], where: str) -> None:
    for name, value in values.items():
        if name not in known and name not in PASSED_OVER and value:
            raise UserError(f"{where}: {name} is set to {value!r:.60}, which is not supported; merge it with peft")


def lora_settings(folder: Path, key: str, pickled: bool, remedy: str) -> dict[str, Any]:
    """Read the arguments of peft's `LoraConfig` from an adapter's folder.

    Args:
        folder: the adapter's.
        key: the config key that named the adapter.
        pickled: whether weights may be a pickle.
        remedy: the option that allows a pickle, for the message.

    Raises:
        UserError: the adapter is neither a LoRA nor a Cartridge, a setting is wrong or unknown, or the weights do not
            fit the settings.
    """
    where = f"{key}.name: {folder / ADAPTER}"
    values = read_object(folder / ADAPTER, key)
    if values.get("peft_type") != "LORA":
        raise UserError(
            f"{where}: peft_type is {values.get('peft_type')!r:.40}; only LORA and CARTRIDGE can be loaded here: merge "
            "the adapter into its base with peft, and name that folder"
        )
    settings = {}
    for name, value in values.items():
        if name in KNOWN and value is not None:
            right, called = KNOWN[name]
            if not right(value):
                raise UserError(f"{where}: {name} must be {called}, not {value!r:.60}")
            settings[name] = value
    _refuse_unknown(values, KNOWN, where)
    found = _weights(folder, key, pickled, remedy)
    ranks = {match[1]: shape for name, shape in found.items() if (match := LAYER.fullmatch(name))}
    if not ranks:
        raise UserError(f"{key}.name: the weights of {folder} are not those of a LoRA: none is named lora_A")
    most = max(shape[0] for shape in ranks.values() if shape)
    for rank in (settings.get("r", 8), *settings.get("rank_pattern", {}).values()):
        if rank > most:
            raise UserError(f"{where}: a rank of {rank:.6g}, but the weights have at most {most}")
    if isinstance(settings.get("target_modules"), str) and settings["target_modules"] != "all-linear":
        settings["target_modules"] = sorted(ranks)
    return settings


def _weights(folder: Path, key: str, pickled: bool, remedy: str) -> dict[str, list[int]]:
    """Names and shapes of the weights."""
    if (folder / WEIGHTS).exists():
        return shapes(folder / WEIGHTS, key)
    if not (folder / PICKLED).is_file():
        raise UserError(f"{key}.name: the adapter {folder} has no {WEIGHTS}")
    if not pickled:
        raise UserError(
            f"{key}.name: the weights of {folder} are a pickle ({PICKLED}), which is not read; {remedy} reads it"
        )
    try:
        tensors = torch.load(folder / PICKLED, map_location="cpu", weights_only=True)
        return {str(name): list(tensor.shape) for name, tensor in tensors.items()}
    except Exception as error:
        raise UserError(f"{key}.name: cannot load {folder / PICKLED}: {str(error).splitlines()[0]}") from error
