"""A model or a tokenizer from a hub id, a folder, a GGUF file or the packaged default."""

import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jsonargparse import ArgumentError, ArgumentParser
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file  # type: ignore[attr-defined]

from opcd.accel import accelerator
from opcd.accel.precision import fast_dtype, warn_if_emulated
from opcd.models import gguf_folder as gguf
from opcd.models.folders import (
    ADAPTER,
    base_name,
    check_model_folder,
    check_weights,
    explain,
    has_pickles_only,
    lora_settings,
    weight_budget,
)
from opcd.models.hub_access import hub_reachable
from opcd.runtime.did_you_mean import beside, did_you_mean, is_run
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require
from opcd.runtime.interruption import check, doing

PACKAGED = "smollm2-135m"
COMMIT = re.compile("[0-9a-f]{40}")
IN_A_CONFIG = re.compile(r"[\w.]*[a-z]")
"""What a config calls a model; a command that has it as an argument calls it RUN, MODEL or --beside."""
TEXT_PART = {
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
    r"^language_model\.lm_head\.": "lm_head.",
}
"""What the weights of the text part are called in a model of text and images -> in a text model."""
TOKENIZERS = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json")
"""Files that a tokenizer is made from."""


@dataclass
class ModelConfig:
    """Which model, and how to load it."""

    name: str = PACKAGED
    """A hub id (org/name), a folder, a .gguf file, or the packaged model smollm2-135m (4-bit weights, unpacked)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: float32 for weights that are trained or averaged; for frozen ones bfloat16 where the
    device has instructions for it, else float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """bitsandbytes: LLM.int8(), or NF4 with double quantization; the head stays as it is. For weights that are not
    trained: a teacher's, or a student's under an adapter."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"] = "sdpa"
    """Attention implementation of transformers."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; refused for anything that lies on this disk."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused. On: a hub id must have a revision."""
    pickled_weights: bool = False
    """Accept weights that are no safetensors, but pickles, where the model has no others."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the model's own."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables of the chat template, such as {enable_thinking: false}."""


def saved_model_config(values: object, where: str, trust_remote_code: bool, pickled_weights: bool) -> ModelConfig:
    """The model of a run that somebody may have made, out of the plain values of its config.

    Args:
        values: what the file says.
        where: the file, for messages.
        trust_remote_code: whether the command line lets the model's code run; the file alone cannot.
        pickled_weights: the same for pickles.

    Raises:
        UserError: they are no model's settings, or ask for what the command line does not allow.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} has no model.student of this opcd: it is no object")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ModelConfig, "student", fail_untyped=False)
    try:
        config: ModelConfig = parser.instantiate_classes(parser.parse_object({"student": values})).student
    except (ArgumentError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{where} has no model.student of this opcd: {explain(error)}") from error
    if config.trust_remote_code and not trust_remote_code:
        raise UserError(
            f"{where} asks to run Python code that comes with the model {config.name} (trust_remote_code: true); a "
            "file of a run cannot allow that: read the code, and give --trust_remote_code if you trust it"
        )
    if config.pickled_weights and not pickled_weights:
        raise UserError(
            f"{where} asks to load the model {config.name} from pickles (pickled_weights: true); a file of a run "
            "cannot allow that: give --pickled_weights if you trust whoever made them"
        )
    return replace(config, trust_remote_code=trust_remote_code, pickled_weights=pickled_weights)


def resolve(config: ModelConfig, key: str = "model.student") -> str:
    """Folder or hub id to load from; a GGUF file is converted to a folder of the user's cache first.

    Raises:
        UserError: the name is neither a model on this disk nor a hub id that can be reached.
    """
    path = Path(config.name).expanduser()
    local = config.name == PACKAGED or path.exists()
    if local and config.revision is not None:
        raise UserError(f"{key}.revision: {config.name} lies on this disk, where a revision has no effect; remove it")
    if config.name == PACKAGED:
        return str(gguf.converted(gguf.packaged_file(), "packaged"))
    if path.suffix == ".gguf" and path.is_file():
        return str(gguf.converted(path, key))
    if path.is_dir():
        return _model_folder(path, key, config.trust_remote_code)
    return _hub_id(config, key)


def load_tokenizer(config: ModelConfig, key: str = "model.student") -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token and the chat template that the config asks for."""
    name = config.tokenizer or resolve(config, key)
    trusted = config.trust_remote_code
    if config.tokenizer and Path(name).is_dir():
        check_model_folder(Path(name), key, trusted)
    elif config.tokenizer:
        trusted = False  # `revision` is the model's: nothing would pin the code of another repository
    if Path(name).is_dir() and not trusted and not any(any(Path(name).glob(file)) for file in TOKENIZERS):
        configurable = f"; set {key}.tokenizer to the folder or hub id of one" if IN_A_CONFIG.fullmatch(key) else ""
        raise UserError(f"{key}.name: {name} has no tokenizer (such as tokenizer.json){configurable}")
    with _explained(f"{key}.tokenizer" if config.tokenizer else f"{key}.name", name, key):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name,
            revision=None if config.tokenizer else config.revision,
            trust_remote_code=trusted,
        )
        tokenizer.decode(tokenizer("a").input_ids)  # settings of the wrong kind fail only where they are used
    if tokenizer.eos_token_id is None:
        raise UserError(f"{key}.name: the tokenizer of {name} has no end-of-sequence token; set one in its folder")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(config.chat_template, f"{key}.chat_template")
    return tokenizer


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
    """
    name, base = _with_base(config, key)
    doing(f"loading {config.name}")
    if config.dtype == "auto":
        dtype = default_dtype or fast_dtype(device)
    else:
        dtype = getattr(torch, config.dtype)
        warn_if_emulated(f"{key}.dtype", dtype, device)
    quantization = quantization_config(config, dtype, key)
    options: dict[str, Any] = {} if quantization is None else {"quantization_config": quantization}
    attention = _attention(config, key)
    text = _text_part(config, key)
    if text is not None:
        options |= {"config": text, "key_mapping": TEXT_PART}
    if Path(base).is_dir():
        _refuse_pickles(config, Path(base), key)
    with _explained(f"{key}.name", name, key), _bounds(base, key):
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
        model.base_model_prefix = "model"  # Llama 4 names its whole, within which it is the text part
    if missing := sorted(loaded[1]["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"{key}.name: {base} lacks weights of the model that it describes: {missing[0]}{more}")
    if name != base:
        model = _with_adapter(model, config, Path(name), key)
    check_weights(model, f"{key}.name: {name}")
    # What is mapped from a file has been read once; an embedding holds on to all of it.
    accelerator(device).forget_pages(list(model.parameters()))
    model.eval()
    for layer in _layers(model):
        layer.register_forward_pre_hook(_leave_here)
    return model


def _layers(model: PreTrainedModel) -> nn.ModuleList | list[nn.Module]:
    """The model's layers, or none where they are not in one list."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, [])


def _leave_here(layer: nn.Module, inputs: object) -> None:
    """A pass over many tokens takes minutes on a CPU: a signal is noticed before each layer (`Interrupted`)."""
    check()


def _with_base(config: ModelConfig, key: str) -> tuple[str, str]:
    """Folder or hub id of the model, and of the model under it where it is an adapter."""
    name = resolve(config, key)
    base = base_of(name, key)
    if base == name:
        return name, name
    if Path(base).is_dir():
        if (Path(base) / ADAPTER).is_file():
            raise UserError(f"{key}.name: {name} is an adapter of {base}, which is an adapter itself; merge that first")
        _model_folder(Path(base), key, config.trust_remote_code)
        return name, base
    if config.trust_remote_code:
        raise UserError(
            f"{key}.trust_remote_code: {name} is an adapter of {base}, whose code no commit pins; download {base}, "
            f"read its code, and set the folder in {Path(name) / ADAPTER}"
        )
    return name, _hub_id(ModelConfig(base), key)


def _with_adapter(model: PreTrainedModel, config: ModelConfig, folder: Path, key: str) -> PreTrainedModel:
    from peft import LoraConfig, PeftModel

    settings = lora_settings(folder, key, config.pickled_weights, _option(key, "pickled_weights"))
    with _explained(f"{key}.name", str(folder), key), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(model, str(folder), config=LoraConfig(**settings))
    for warning in said:  # others are of tied heads, and of what transformers has renamed
        if "missing adapter keys" in str(warning.message):
            raise UserError(f"{key}.name: {folder} lacks weights of the adapter that it describes: {warning.message}")
    base: PreTrainedModel = adapted.get_base_model()  # type: ignore[assignment]
    return base


def base_of(name: str, key: str = "model.student") -> str:
    """The model under an adapter's folder; any other name is its own.

    Raises:
        UserError: the adapter cannot be read, or needs peft, which is not installed.
    """
    if not (Path(name) / ADAPTER).is_file():
        return name
    require("adapters", "peft", f"{key}.name: {name} is an adapter, which")
    base = base_name(Path(name), key)
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(
            f"{key}.name: {name} is an adapter of {base}, which is not there; set its path in {Path(name) / ADAPTER}"
        )
    return base


def _refuse_pickles(config: ModelConfig, folder: Path, key: str) -> None:
    if has_pickles_only(folder) and not config.pickled_weights:
        raise UserError(
            f"{key}.name: cannot load {folder}: it has no safetensors; its weights are pickles, which are read with "
            f"{_option(key, 'pickled_weights')} only"
        )


def _bounds(base: str, key: str) -> AbstractContextManager[None]:
    """What the weights of a folder are enough for; nothing where they are not here yet."""
    return weight_budget(Path(base), key) if Path(base).is_dir() else nullcontext()


def _text_part(config: ModelConfig, key: str) -> PreTrainedConfig | None:
    """The config of the text model in one of text and images, where only the former is a causal language model.

    Raises:
        UserError: neither is.
    """
    whole = architecture(config, key)
    if type(whole) in MODEL_FOR_CAUSAL_LM_MAPPING or hasattr(whole, "auto_map"):
        return None
    text: PreTrainedConfig = whole.get_text_config()
    if text is not whole and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text.tie_word_embeddings = whole.tie_word_embeddings  # the head belongs to the whole
        return text
    raise UserError(
        f"{key}.name: {config.name} is a {whole.model_type}, and transformers {transformers.__version__} has no causal "
        f"language model for it{'' if text is whole else f' or its text part ({text.model_type})'}; choose another"
    )


def _keep_text_part(model: Any) -> None:
    """Have a text model saved as one: under its own names, its head tied where it is."""
    kept = [each for each in model._weight_conversions if not TEXT_PART.keys() & set(each.source_patterns)]
    model._weight_conversions = kept
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    model.config.tie_word_embeddings = head.weight is embedding.weight


def _attention(config: ModelConfig, key: str) -> str:
    """The attention to ask transformers for: eager where a model has no sdpa, which is said."""
    kind = type(architecture(config, key))
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)  # none: its code comes with it
    if config.attention != "sdpa" or model is None or model._supports_sdpa:
        return config.attention
    _say(f"{key}.attention: {model.__name__} has no sdpa in transformers; eager is taken")
    return "eager"


@cache
def _say(text: str) -> None:
    """Print a line once, on one rank."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr)


def own_quantization(config: ModelConfig, key: str = "model.student") -> str | None:
    """How the weights of a model are quantized in their files; None where they are not."""
    settings = getattr(architecture(config, key), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def quantization_config(config: ModelConfig, dtype: torch.dtype, key: str) -> BitsAndBytesConfig | None:
    """How transformers quantizes the weights while it loads them.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.quantization == "none":
        return None
    if (method := own_quantization(config, key)) is not None:
        raise UserError(f"{key}.quantization: {config.name} is quantized already ({method}); remove the key")
    require("bitsandbytes", "bitsandbytes", f"{key}.quantization")
    if config.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def context_window(config: ModelConfig, key: str = "model.student") -> int | None:
    """Most tokens that the model takes, read from its config without loading weights; None where it states none."""
    window = getattr(architecture(config, key).get_text_config(), "max_position_embeddings", None)
    return int(window) if window is not None else None


def architecture(config: ModelConfig, key: str = "model.student") -> PreTrainedConfig:
    """The config of the model (of an adapter's base), without its weights."""
    _, name = _with_base(config, key)
    with _explained(f"{key}.name", config.name, key):
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return loaded


def _model_folder(path: Path, key: str, trusted: bool) -> str:
    if not (path / ADAPTER).is_file() and not (path / "config.json").exists():
        raise UserError(f"{key}.name: {path.resolve()} is no model folder: it has neither config.json nor {ADAPTER}")
    check_model_folder(path, key, trusted)
    return str(path)


def _hub_id(config: ModelConfig, key: str) -> str:
    name = config.name
    if is_run(name):
        raise UserError(f"{key}.name: no folder {Path(name).expanduser().absolute()}{beside(Path(name))}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        hint = did_you_mean(name, [PACKAGED], cutoff=0.5)
        raise UserError(
            f"{key}.name: no model {name!r}: it is no folder or .gguf file here ({Path(name).expanduser().resolve()}), "
            f"no hub id (org/name), and not the packaged model {PACKAGED}{hint}"
        )
    if config.trust_remote_code and not COMMIT.fullmatch(config.revision or ""):
        raise UserError(
            f"{_option(key, 'trust_remote_code')} runs code out of {name}: set {key}.revision to the commit that you "
            "have read (40 hexadecimal digits), for a branch or tag can change"
        )
    with _explained(f"{key}.name", name, key):
        known = isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str)
        if not known and not hub_reachable():
            raise LocalEntryNotFoundError(name)
        file = hf_hub_download(name, "config.json", revision=config.revision)
        check_model_folder(Path(file).parent, key, config.trust_remote_code)
        adapter = find_adapter_config_file(name, revision=config.revision)
    if adapter is not None:
        raise UserError(f"{key}.name: {name} holds an adapter ({ADAPTER}); download it, and name its folder")
    return name


def _read_template(file: str, key: str) -> str:
    if Path(file).exists() and not Path(file).is_file():
        raise UserError(f"{key}: {Path(file).resolve()} is no regular file")
    try:
        return Path(file).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{key}: cannot read {Path(file).resolve()}: {reason}") from error


def _option(key: str, name: str) -> str:
    """How the user turns on a field of the model that `key` names: in a config, or as an option of a command."""
    return f"{key}.{name}: true" if IN_A_CONFIG.fullmatch(key) else f"--{name}"


@contextmanager
def _explained(where: str, name: str, key: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one message that names the config key and the remedy."""
    try:
        yield
    except UserError:
        raise
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        near = beside(Path(name)) if Path(name).parent.is_dir() else ""
        raise UserError(
            f"{where}: {name} is not on this machine and the hub cannot be reached; give a local folder, a .gguf file "
            f"or {PACKAGED} (`opcd doctor` shows what is there){near}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{where}: the hub refuses {name}: {str(error).splitlines()[0]}") from error
    except BaseException as error:
        # transformers raises whatever a wrong file leads to, and a panic of tokenizers is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = explain(error)
        if "trust_remote_code" in str(error):
            said = (
                "it comes with Python code, which is not run; read the code, and if you trust it set "
                f"{_option(key, 'trust_remote_code')}"
            )
        elif "safetensors" in str(error) and isinstance(error, OSError):
            said += f" Pickled weights are read with {_option(key, 'pickled_weights')} only"
        raise UserError(f"{where}: cannot load {name}: {said}") from error
