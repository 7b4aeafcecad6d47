"""A model's folder: which of its files can be read, and whether they say what a model's files say."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from opcd.models.folders.config_limits import SPARE, Budget, oversized
from opcd.models.folders.folder_files import kind, read_object, shapes, values_in
from opcd.runtime.errors import UserError

CONFIG = "config.json"
READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
"""What transformers opens."""
OBJECTS = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Of a config, and of the configs in it: whole numbers greater than 0."""
NUMBERS = ("_size", "_dim", "_heads", "_layers", "_experts", "_embeddings")
"""Ends of names whose values are numbers, or lists of them."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
PER_BYTE = 8
"""Most weights of a byte: quantized ones have a bit or more."""


def check_model_folder(folder: Path, key: str, trusted: bool = False) -> None:
    """Refuse files that are none, and settings that no model has.

    Args:
        folder: a model's, or a tokenizer's.
        key: the config key that named it.
        trusted: whether code of the folder may run.

    Raises:
        UserError: names the file, and the field in it.
    """
    for entry in folder.iterdir():
        if entry.suffix in READ and not entry.is_file() and not entry.is_dir():
            raise UserError(f"{key}.name: {entry} is no regular file")
    for name in OBJECTS:
        if (folder / name).exists():
            values, where = read_object(folder / name, key), f"{key}.name: {folder / name}"
            _check_fields(values, where, name)
            if trusted and any("--" in str(code) for code in (values.get("auto_map") or {}).values()):
                raise UserError(
                    f"{where}: auto_map names code of another repository; put it into the folder, and name that"
                )
    for index in folder.glob("*.index.json"):
        _check_index(read_object(index, key), f"{key}.name: {index}")


def _check_fields(values: dict[str, Any], where: str, file: str) -> None:
    for _, name, value in values_in(values):
        last = name.rpartition(".")[2]
        if file == CONFIG and (problem := oversized(name, value)):
            raise UserError(f"{where}: {problem}")
        if file == CONFIG and last in SIZES and value is not None and not (_whole(value) and value > 0):
            raise UserError(f"{where}: {name} must be a whole number greater than 0, not {_shown(value)}")
        if file == CONFIG and last.endswith(NUMBERS) and (isinstance(value, str) or value == {}):
            raise UserError(f"{where}: {name} must be a number, not {_shown(value)}")
        if last in IDS and file != "tokenizer_config.json" and not _ids(value):
            raise UserError(f"{where}: {name} must be a token id or a list of them, not {_shown(value)}")
    if not isinstance(values.get("auto_map") or {}, dict):
        raise UserError(f"{where}: auto_map must be an object, not {kind(values['auto_map'])}")
    template = values.get("chat_template")
    if template is not None and not isinstance(template, str | list):
        raise UserError(f"{where}: chat_template must be a text, not {kind(template)}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(value: object) -> bool:
    values: list[Any] = value if isinstance(value, list) else [value]
    return value is None or all(_whole(each) and -1 <= each < 2**31 for each in values)


def _shown(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float | str) else kind(value)


def _check_index(index: dict[str, Any], where: str) -> None:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{where}: weight_map must be an object of file names")
    for file in set(files.values()):
        if Path(file).name != file:
            raise UserError(f"{where}: weight_map names {file!r:.80}; weights lie in the folder itself")


def weight_budget(folder: Path, key: str) -> Budget:
    """What the weights of a model's folder are enough for.

    Raises:
        UserError: a file of weights is damaged.
    """
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") and file.is_file()]
    whole = sum(file.stat().st_size for file in files)
    known = sum(len(shapes(file, key)) for file in files if file.suffix == ".safetensors")
    pickled = any(file.suffix == ".bin" for file in files)
    # Experts that lie in one tensor may be a module each, and the other way round.
    tensors = 200_000 if pickled else 1000 + 100 * known
    return Budget(PER_BYTE * whole + SPARE, tensors, f"{key}.name: {folder / CONFIG}")


def has_pickles_only(folder: Path) -> bool:
    """Whether the weights of a folder are pickles."""
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


@torch.no_grad()
def check_weights(model: nn.Module, where: str) -> None:
    """Refuse weights that are not finite.

    Raises:
        UserError: names the first, and how many there are.
    """
    wrong = [name for name, weight in model.named_parameters() if not _finite(weight)]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{where}: the weights hold NaN or infinity: {wrong[0]}{more}; get the model again")


def _finite(weight: torch.Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.itemsize < 2 or weight.is_meta:
        return True  # packed in 8 bits or fewer: what was quantized was finite
    low, high = weight.aminmax()  # NaN in, NaN out; nothing as large as the weight is allocated
    return bool(low.isfinite() and high.isfinite())
