"""Which model the user asks for, where it is, and what is known of it without its weights.

`ModelConfig` is the user's choice. `resolve` finds the folder or hub id to load from; the files there are checked
before transformers opens them. `architecture` reads the model's config. `explained` turns the errors of a load into
messages that name the config key and the remedy.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from jsonargparse import ArgumentError, ArgumentParser
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import find_adapter_config_file  # type: ignore[attr-defined]

from opcd.models import gguf_folder as gguf
from opcd.models.adapter_folder import ADAPTER, base_name, virtual_tokens
from opcd.models.hub_access import hub_reachable
from opcd.models.model_folder import check_model_folder, explain
from opcd.runtime.did_you_mean import beside, did_you_mean, is_run
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

PACKAGED = "smollm2-135m"
COMMIT = re.compile("[0-9a-f]{40}")
IN_A_CONFIG = re.compile(r"[\w.]*[a-z]")
"""The keys of models in a config; a command calls the model that is its argument RUN, MODEL or --beside."""


@dataclass
class ModelConfig:
    """Which model, and how to load it."""

    name: str = PACKAGED
    """A hub id (org/name), a folder, a .gguf file, or the packaged model smollm2-135m (4-bit weights, unpacked)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights. auto: float32 for weights that are trained or averaged; for frozen ones bfloat16 where the
    device has instructions for it, else float32."""
    quantization: Literal["none", "8bit", "4bit"] = "none"
    """bitsandbytes: LLM.int8(), or NF4 with double quantization; the head is not quantized. Only for weights that are
    not trained: a teacher's, or a student's under an adapter."""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention implementation of transformers."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; an error for local models."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. false: such a model is an error. true: a hub id needs a revision."""
    pickled_weights: bool = False
    """Load pickled weights where the model has no safetensors."""
    tokenizer: str | None = None
    """Hub id or folder of the tokenizer, if it is not the model's own."""
    chat_template: str | None = None
    """A Jinja file that replaces the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Extra variables of the chat template, such as {enable_thinking: false}."""


def saved_model_config(values: object, where: str, trust_remote_code: bool, pickled_weights: bool) -> ModelConfig:
    """Read the model of a run, which somebody else may have made, from the plain values of its config.

    Args:
        values: the student's section of the file.
        where: the file, for messages.
        trust_remote_code: whether the command line lets the model's code run; the file alone cannot.
        pickled_weights: the same for pickles.

    Raises:
        UserError: the values are not a model's settings, or ask for what the command line does not allow.
    """
    if not isinstance(values, dict):
        raise UserError(f"{where} has no model.student of this opcd: it is not an object")
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
    """Find the folder or hub id to load from; a GGUF file is converted to a folder of the user's cache first.

    Raises:
        UserError: the name is neither a local model nor a hub id that can be reached.
    """
    path = Path(config.name).expanduser()
    if config.revision is not None and (config.name == PACKAGED or path.exists()):
        raise UserError(f"{key}.revision applies to hub models only, and {config.name} is local; remove the key")
    if config.name == PACKAGED:
        return str(gguf.converted(gguf.packaged_file(), "packaged"))
    if path.suffix == ".gguf" and path.is_file():
        return str(gguf.converted(path, key))
    if path.is_dir():
        _check_folder(path, key, config.trust_remote_code)
        return str(path)
    _check_hub_id(config, key)
    return config.name


def _check_folder(path: Path, key: str, trusted: bool) -> None:
    if not (path / ADAPTER).is_file() and not (path / "config.json").exists():
        raise UserError(f"{key}.name: {path.resolve()} is not a model folder: it has neither config.json nor {ADAPTER}")
    check_model_folder(path, key, trusted)


def _check_hub_id(config: ModelConfig, key: str) -> None:
    name = config.name
    if is_run(name):
        raise UserError(f"{key}.name: no folder {Path(name).expanduser().absolute()}{beside(Path(name))}")
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        hint = did_you_mean(name, [PACKAGED], cutoff=0.5)
        raise UserError(
            f"{key}.name: no model {name!r}: not a folder or .gguf file here ({Path(name).expanduser().resolve()}), "
            f"not a hub id (org/name), and not the packaged model {PACKAGED}{hint}"
        )
    if config.trust_remote_code and not COMMIT.fullmatch(config.revision or ""):
        raise UserError(
            f"{option(key, 'trust_remote_code')} runs code out of {name}: set {key}.revision to the commit that you "
            "have read (40 hexadecimal digits), for a branch or tag can change"
        )
    with explained(f"{key}.name", name, key):
        known = isinstance(try_to_load_from_cache(name, "config.json", revision=config.revision), str)
        if not known and not hub_reachable():
            raise LocalEntryNotFoundError(name)
        file = hf_hub_download(name, "config.json", revision=config.revision)
        check_model_folder(Path(file).parent, key, config.trust_remote_code)
        adapter = find_adapter_config_file(name, revision=config.revision)
    if adapter is not None:
        raise UserError(f"{key}.name: {name} holds an adapter ({ADAPTER}); download it, and name its folder")


def base_of(name: str, key: str = "model.student") -> str:
    """Find the model under an adapter's folder; any other name is its own base.

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


def with_base(config: ModelConfig, key: str) -> tuple[str, str]:
    """The folder or hub id of the model, and of its base: the same one where the model is not an adapter."""
    name = resolve(config, key)
    base = base_of(name, key)
    if base == name:
        return name, name
    if Path(base).is_dir():
        if (Path(base) / ADAPTER).is_file():
            raise UserError(f"{key}.name: {name} is an adapter of {base}, which is an adapter itself; merge that first")
        _check_folder(Path(base), key, config.trust_remote_code)
    elif config.trust_remote_code:
        raise UserError(
            f"{key}.trust_remote_code: {name} is an adapter of {base}, whose code no commit pins; download {base}, "
            f"read its code, and set the folder in {Path(name) / ADAPTER}"
        )
    else:
        _check_hub_id(ModelConfig(base), key)
    return name, base


def architecture(config: ModelConfig, key: str = "model.student") -> PreTrainedConfig:
    """Read the config of the model, or of an adapter's base, without its weights."""
    return read_architecture(with_base(config, key)[1], config, key)


def read_architecture(base: str, config: ModelConfig, key: str) -> PreTrainedConfig:
    with explained(f"{key}.name", config.name, key):
        loaded: PreTrainedConfig = AutoConfig.from_pretrained(
            base, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    return loaded


def own_quantization(config: ModelConfig, key: str = "model.student") -> str | None:
    """Read how the weights are quantized in the model's files; None: they are not."""
    return quantization_of(architecture(config, key))


def quantization_of(whole: PreTrainedConfig) -> str | None:
    settings = getattr(whole, "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return str(getattr(method, "value", method))


def context_window(config: ModelConfig, key: str = "model.student") -> int | None:
    """Read the most tokens that the model takes, without loading weights; None: its config does not say.

    A Cartridge takes the first positions.
    """
    name, base = with_base(config, key)
    window = getattr(read_architecture(base, config, key).get_text_config(), "max_position_embeddings", None)
    return int(window) - (virtual_tokens(Path(name), key) if name != base else 0) if window is not None else None


def option(key: str, name: str) -> str:
    """How the user turns on a field of the model that `key` names: in a config, or as an option of a command."""
    return f"{key}.{name}: true" if IN_A_CONFIG.fullmatch(key) else f"--{name}"


@contextmanager
def explained(where: str, name: str, key: str) -> Iterator[None]:
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
        # transformers raises whatever a wrong file leads to, and a panic of tokenizers is not an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        said = explain(error)
        if "trust_remote_code" in str(error):
            said = (
                "it comes with Python code, which is not run; read the code, and if you trust it set "
                f"{option(key, 'trust_remote_code')}"
            )
        elif "safetensors" in str(error) and isinstance(error, OSError):
            said += f" Pickled weights are read with {option(key, 'pickled_weights')} only"
        raise UserError(f"{where}: cannot load {name}: {said}") from error
