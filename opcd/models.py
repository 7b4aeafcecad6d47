"""A model or a tokenizer from a hub id, a folder, a GGUF file or the packaged default."""

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from opcd import gguf
from opcd.activity import doing
from opcd.did_you_mean import beside, did_you_mean, is_run
from opcd.errors import UserError
from opcd.extras import require
from opcd.hub import hub_reachable
from opcd.interruption import check
from opcd.memory import let_go
from opcd.precision import fast_dtype, warn_if_emulated

PACKAGED = "smollm2-135m"
ADAPTER = "adapter_config.json"
"""peft's file, which makes a folder an adapter's."""
COMMIT = re.compile("[0-9a-f]{40}")


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
        return _model_folder(path, key)
    return _hub_id(config, key)


def load_tokenizer(config: ModelConfig, key: str = "model.student") -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token and the chat template that the config asks for."""
    name = config.tokenizer or resolve(config, key)
    with _explained(f"{key}.tokenizer" if config.tokenizer else f"{key}.name", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            name,
            revision=None if config.tokenizer else config.revision,
            trust_remote_code=config.trust_remote_code,
        )
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
    name = resolve(config, key)
    doing(f"loading {config.name}")
    adapter, base = name, base_of(name, key)
    if config.dtype == "auto":
        dtype = default_dtype or fast_dtype(device)
    else:
        dtype = getattr(torch, config.dtype)
        warn_if_emulated(f"{key}.dtype", dtype, device)
    with _explained(f"{key}.name", name):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            base,
            dtype=dtype,
            attn_implementation=config.attention,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=None if config.pickled_weights else True,
            quantization_config=quantization_config(config, dtype, key),
        )
        if adapter != base:
            model = _with_adapter(model, adapter)
    if config.quantization != "none":
        let_go(model.parameters())  # the embedding holds the whole file's mapping, with what has been quantized since
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


def _with_adapter(model: PreTrainedModel, folder: str) -> PreTrainedModel:
    from peft import PeftModel

    with warnings.catch_warnings():  # of tied heads, and of what transformers has renamed
        warnings.simplefilter("ignore")
        adapted: PreTrainedModel = PeftModel.from_pretrained(model, folder).get_base_model()  # type: ignore[assignment]
    return adapted


def base_of(name: str, key: str = "model.student") -> str:
    """The model under an adapter's folder; any other name is its own.

    Raises:
        UserError: the adapter cannot be read, or needs peft, which is not installed.
    """
    file = Path(name) / ADAPTER
    if not file.is_file():
        return name
    require("adapters", "peft", f"{key}.name: {name} is an adapter, which")
    try:
        base = json.loads(file.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise UserError(f"{key}.name: {file} does not say which model it belongs to ({error})") from error
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{key}.name: {name} is an adapter of {base}, which is not there; set its path in {file}")
    return str(base)


def quantization_config(config: ModelConfig, dtype: torch.dtype, key: str) -> BitsAndBytesConfig | None:
    """How transformers quantizes the weights while it loads them.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if config.quantization == "none":
        return None
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
    name = base_of(resolve(config, key), key)
    with _explained(f"{key}.name", config.name):
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(
            name, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return loaded


def _model_folder(path: Path, key: str) -> str:
    if (path / ADAPTER).is_file() and not (path / "config.json").is_file():
        return str(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{key}.name: {path.resolve()} is no model folder: it has neither config.json nor {ADAPTER}")
    try:
        json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{key}.name: {path.resolve() / 'config.json'} is not valid JSON: {error}") from error
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
            f"{key}.trust_remote_code runs code out of {name}: set {key}.revision to the commit that you have read "
            "(40 hexadecimal digits), for a branch or tag can change"
        )
    with _explained(f"{key}.name", name):
        known = isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str)
        if not known and not hub_reachable():
            raise LocalEntryNotFoundError(name)
        hf_hub_download(name, "config.json", revision=config.revision)
    return name


def _read_template(file: str, key: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{key}: cannot read {Path(file).resolve()}: {error.strerror}") from error


@contextmanager
def _explained(key: str, name: str) -> Iterator[None]:
    """Turn the many errors of a failed load into one message that names the config key."""
    try:
        yield
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError) as error:
        raise UserError(
            f"{key}: {name} is not on this machine and the hub cannot be reached; give a local folder, a .gguf file or "
            f"{PACKAGED} (`opcd doctor` shows what is there){beside(Path(name)) if Path(name).parent.is_dir() else ''}"
        ) from error
    except HfHubHTTPError as error:
        raise UserError(f"{key}: the hub refuses {name}: {str(error).splitlines()[0]}") from error
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise UserError(f"{key}: cannot load {name}: {str(error).strip().splitlines()[0]}") from error
