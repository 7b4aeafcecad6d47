"""Load the tokenizer and the weights of a model: its base first, then the adapter where its folder holds one."""

import os
import sys
import warnings
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opcd.accel import accelerator
from opcd.accel.precision import fast_dtype, warn_if_emulated
from opcd.models.adapter_folder import PROMPT, cartridge_settings, lora_settings, virtual_tokens
from opcd.models.key_value_prefix import attach_prefix, keys_and_values
from opcd.models.model_folder import (
    check_model_folder,
    check_weights,
    first_and_more,
    has_pickles_only,
    limit_of_folder,
)
from opcd.models.model_source import (
    IN_A_CONFIG,
    ModelConfig,
    explained,
    option,
    quantization_of,
    read_architecture,
    resolve,
    with_base,
)
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require
from opcd.runtime.interruption import check, doing

TEXT_PART = {
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""Names of the text part's weights in a model of text and images -> in a text model."""
TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
"""Files that a tokenizer is made from."""


def load_tokenizer(config: ModelConfig, key: str = "model.student") -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token and the chat template that the config asks for."""
    name = config.tokenizer or resolve(config, key)
    trusted = config.trust_remote_code
    if config.tokenizer and Path(name).is_dir():
        check_model_folder(Path(name), key, trusted)
    elif config.tokenizer:
        trusted = False  # `revision` is the model's: nothing would pin the code of another repository
    if Path(name).is_dir() and not trusted and not any(any(Path(name).glob(file)) for file in TOKENIZERS):
        configurable = f"; set {key}.tokenizer to the folder or hub id of one" if IN_A_CONFIG.fullmatch(key) else ""
        raise UserError(f"{key}.name: {name} has no tokenizer (such as tokenizer.json){configurable}")
    with explained(f"{key}.tokenizer" if config.tokenizer else f"{key}.name", name, key):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name, revision=None if config.tokenizer else config.revision, trust_remote_code=trusted
        )
        tokenizer.decode(tokenizer("a").input_ids)  # settings of the wrong kind fail only where they are used
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}.name: the tokenizer of {name} has no end-of-sequence token; set one in its folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template, f"{key}.chat_template")
    return tokenizer


def _read_template(file: str, key: str) -> str:
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{key}: {Path(file).resolve()} is not a regular file")
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}: cannot read {Path(file).resolve()}: {reason}") from error


def load_model(
    config: ModelConfig,
    default_dtype: torch.dtype | None = None,
    key: str = "model.student",
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load the causal language model in eval mode, on the CPU.

    Args:
        config: which one, and how.
        default_dtype: what `dtype: auto` means; None: the type that `device` computes fastest in.
        key: what the user named the model by, for messages.
        device: where the model will run.

    Raises:
        UserError: the model is not there, cannot be loaded, or holds NaN.
    """
    name, base = with_base(config, key)
    doing(f"loading {config.name}")
    if config.dtype == "auto":
        dtype = default_dtype or fast_dtype(device)
    else:
        dtype = getattr(torch, config.dtype)
        warn_if_emulated(f"{key}.dtype", dtype, device)
    with explained(f"{key}.name", name, key):
        model = _load_base(base, config, dtype, key)
    if name != base:
        model = _with_adapter(model, config, Path(name), key)
    check_weights(model, f"{key}.name: {name}")
    # The check has read each mapped weight once; an embedding would keep all of its pages in memory.
    accelerator(device).forget_pages(list(model.parameters()))
    model.eval()
    for layer in _layers(model):
        layer.register_forward_pre_hook(_check_signal)
    return model


def _load_base(base: str, config: ModelConfig, dtype: torch.dtype, key: str) -> PreTrainedModel:
    """Load the model itself, without an adapter."""
    whole = read_architecture(base, config, key)
    options: dict[str, Any] = {}
    if (quantization := _bitsandbytes(config, whole, dtype, key)) is not None:
        options["quantization_config"] = quantization
    attention = _attention(config, whole, key)
    if (text := _text_part(config, whole, key)) is not None:
        options |= {"config": text, "key_mapping": TEXT_PART}
    local = Path(base).is_dir()
    if local and has_pickles_only(Path(base)) and not config.pickled_weights:
        raise UserError(
            f"{key}.name: cannot load {base}: it has no safetensors; its weights are pickles, which are read with "
            f"{option(key, 'pickled_weights')} only"
        )
    with limit_of_folder(Path(base), key) if local else nullcontext():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=attention,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.pickled_weights else True,
            output_loading_info=True,
            **options,
        )
    model: PreTrainedModel = loaded[0]
    if text is not None:
        _keep_text_part(model)
    if model.base_model is model and hasattr(model, "model"):
        model.base_model_prefix = "model"  # Llama 4's prefix names the model of text and images
    if missing := sorted(loaded[1]["missing_keys"]):
        raise UserError(f"{key}.name: {base} lacks weights of the model that it describes: {first_and_more(missing)}")
    return model


def _bitsandbytes(
    config: ModelConfig, whole: PreTrainedConfig, dtype: torch.dtype, key: str
) -> BitsAndBytesConfig | None:
    """How to quantize the weights while they are loaded; None: not at all."""
    if config.quantization == "none":
        return None
    if (method := quantization_of(whole)) is not None:
        raise UserError(f"{key}.quantization: {config.name} is quantized already ({method}); remove the key")
    require("bitsandbytes", "bitsandbytes", f"{key}.quantization")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _attention(config: ModelConfig, whole: PreTrainedConfig, key: str) -> str:
    """The attention implementation to ask for: eager, with a message, where a model has no sdpa."""
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(whole), None)  # None: the code comes with the model
    if config.attention != "sdpa" or model is None or model._supports_sdpa:
        return config.attention
    _print_once(f"{key}.attention: {model.__name__} has no sdpa in transformers; eager is taken")
    return "eager"


@cache
def _print_once(text: str) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def _text_part(config: ModelConfig, whole: PreTrainedConfig, key: str) -> PreTrainedConfig | None:
    """The config of the text part, where a model of text and images is not a causal language model itself.

    Raises:
        UserError: transformers has no causal language model for either.
    """
    if type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(whole, "auto_map"):
        return None
    text: PreTrainedConfig = whole.get_text_config()
    if text is not whole and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text.tie_word_embeddings = whole.tie_word_embeddings  # the head belongs to the whole model
        return text
    raise UserError(
        f"{key}.name: {config.name} is a {whole.model_type}, and transformers {transformers.__version__} has no causal "
        f"language model for it{'' if text is whole else f' or its text part ({text.model_type})'}; choose another"
    )


def _keep_text_part(model: Any) -> None:
    """Make `save_pretrained` write a text model: under its own names, with a tied head where it is tied."""
    kept = [each for each in model._weight_conversions if not TEXT_PART.keys() & set(each.source_patterns)]
    model._weight_conversions = kept
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is embedding.weight


def _with_adapter(model: PreTrainedModel, config: ModelConfig, folder: Path, key: str) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel

    if virtual_tokens(folder, key):
        return _with_cartridge(model, config, folder, key)
    settings = lora_settings(folder, key, config.pickled_weights, option(key, "pickled_weights"))
    with explained(f"{key}.name", str(folder), key), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder), config=LoraConfig(**settings))
    for warning in said:  # other warnings are about tied heads, and about names that transformers has changed
        if "missing adapter keys" in str(warning.message):
            raise UserError(f"{key}.name: {folder} lacks weights of the adapter that it describes: {warning.message}")
    base: PreTrainedModel = adapted.get_base_model()  # type: ignore[assignment]
    return base


def _with_cartridge(model: PreTrainedModel, config: ModelConfig, folder: Path, key: str) -> PreTrainedModel:
    from peft import CartridgeConfig
    from peft.utils import load_peft_weights

    settings = cartridge_settings(folder, key, config.pickled_weights, option(key, "pickled_weights"))
    layers = keys_and_values(model.eval(), torch.tensor([0]), f"{key}.name: {folder}")
    _, heads, _, width = layers[0][0].shape
    own = {"num_layers": len(layers), "num_attention_heads": heads, "token_dim": heads * width}
    for name, value in own.items():
        if settings[name] != value:
            raise UserError(
                f"{key}.name: {folder} is a Cartridge of another model than its base: {name} is {settings[name]}, and "
                f"the base has {value}"
            )
    with explained(f"{key}.name", str(folder), key):
        weights = load_peft_weights(str(folder), device="cpu")
        attach_prefix(model, CartridgeConfig(**settings)).load_prompt_embeddings(weights[PROMPT])
    return model.requires_grad_(False)


def _layers(model: PreTrainedModel) -> nn.ModuleList | list[nn.Module]:
    """The model's layers, or none where they are not in one list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, [])


def _check_signal(layer: nn.Module, inputs: object) -> None:
    """Raise `Interrupted` between two layers after a signal: a pass over many tokens takes minutes on a CPU."""
    check()
