"""Limits for a model's folder that somebody else made, checked before transformers reads it.

The files hold objects of JSON of a bounded size, their fields have plausible values, no file lies outside the folder,
the model is no larger than its weights, and the weights are finite.
"""

import json
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from opcd.runtime.errors import UserError

CONFIG = "config.json"
READ = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")
"""Suffixes of the files that transformers opens."""
OBJECTS = (CONFIG, "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
SIZES = ("hidden_size", "num_hidden_layers", "vocab_size")
"""Fields of a config, and of the configs in it, that are integers greater than 0."""
NUMBERS = ("_size", "_dim", "_heads", "_layers", "_experts", "_embeddings")
"""Ends of the names of fields that are numbers, or lists of numbers."""
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
COUNT = re.compile(r"(layers?|blocks?|heads?|experts?|heads?_kv|block_count|layer_count|head_count|expert_count)$")
"""Names of the numbers of parts that a model is built from in a loop."""
MOST_OF_A_COUNT = 10_000
MOST = 2**40
"""The largest value of any other integer."""
LONGEST = 64 * 2**20
"""Bytes of a JSON file; the largest index of weights has about a tenth."""
DEEPEST = 64
"""Levels of nesting in a JSON file."""
PER_BYTE = 8
"""Most weights in a byte: a quantized weight has a bit or more."""
SPARE = 2**27
"""Elements that a model may have beside those of its files: buffers, masks."""


def check_model_folder(folder: Path, key: str, trusted: bool = False) -> None:
    """Check the JSON files of a model's or a tokenizer's folder.

    Args:
        folder: the folder.
        key: the config key that named it.
        trusted: whether code of the folder may run.

    Raises:
        UserError: names the file, and the field in it.
    """
    for entry in folder.iterdir():
        if entry.suffix in READ and not entry.is_file() and not entry.is_dir():
            raise UserError(f"{key}.name: {entry} is not a regular file")
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


def read_object(file: Path, key: str) -> dict[str, Any]:
    """Read the JSON object in a file.

    Raises:
        UserError: the file is not a regular file, is too large, or holds anything else.
    """
    where = f"{key}.name: {file}"
    if not file.is_file():
        raise UserError(f"{where} is not a file")
    try:
        if file.stat().st_size > LONGEST:
            raise UserError(f"{where} has {file.stat().st_size} bytes; the limit is {LONGEST}")
        value = json.loads(file.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{where} must hold an object, not {kind(value)}")
    if any(depth > DEEPEST for depth, _, _ in _values_in(value)):
        raise UserError(f"{where} is nested too deeply")
    return value


def _values_in(value: dict[str, Any]) -> Iterator[tuple[int, str, Any]]:
    """(depth, field, value) of everything in an object: an object or a list first, then what is in it."""
    rest: list[tuple[int, str, Any]] = [(0, "", value)]
    while rest:
        depth, field, inner = rest.pop()
        yield depth, field, inner
        if isinstance(inner, dict):
            above = f"{field}." if field else ""
            rest.extend((depth + 1, f"{above}{name}"[-200:], each) for name, each in inner.items())
        if isinstance(inner, list):
            rest.extend((depth + 1, field, each) for each in inner)


def kind(value: object) -> str:
    """The name of a value's type in JSON."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def is_integer(value: object) -> bool:
    """Whether a value is an integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_fields(values: dict[str, Any], where: str, file: str) -> None:
    for _, name, value in _values_in(values):
        last = name.rpartition(".")[2]
        if file == CONFIG and (problem := oversized(name, value)):
            raise UserError(f"{where}: {problem}")
        if file == CONFIG and last in SIZES and value is not None and not (is_integer(value) and value > 0):
            raise UserError(f"{where}: {name} must be an integer greater than 0, not {_shown(value)}")
        if file == CONFIG and last.endswith(NUMBERS) and (isinstance(value, str) or value == {}):
            raise UserError(f"{where}: {name} must be a number, not {_shown(value)}")
        if last in IDS and file != "tokenizer_config.json" and not _ids(value):
            raise UserError(f"{where}: {name} must be a token id or a list of them, not {_shown(value)}")
    if not isinstance(values.get("auto_map") or {}, dict):
        raise UserError(f"{where}: auto_map must be an object, not {kind(values['auto_map'])}")
    template = values.get("chat_template")
    if template is not None and not isinstance(template, str | list):
        raise UserError(f"{where}: chat_template must be a text, not {kind(template)}")


def oversized(name: str, value: object) -> str | None:
    """What is wrong with a number of a config; None where nothing is."""
    if not is_integer(value):
        return None
    if COUNT.search(name) and value > MOST_OF_A_COUNT:  # type: ignore[operator]
        return f"{name} is {value:.6g}; the limit is {MOST_OF_A_COUNT}"
    return f"{name} is {value:.6g}; the limit is 2^40" if value > MOST else None  # type: ignore[operator]


def _ids(value: object) -> bool:
    values: list[Any] = value if isinstance(value, list) else [value]
    return value is None or all(is_integer(each) and -1 <= each < 2**31 for each in values)


def _shown(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, int | float | str) else kind(value)


def _check_index(index: dict[str, Any], where: str) -> None:
    files = index.get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{where}: weight_map must be an object of file names")
    for file in set(files.values()):
        if Path(file).name != file:
            raise UserError(f"{where}: weight_map names {file!r:.80}; weights must be in the folder itself")


def has_pickles_only(folder: Path) -> bool:
    """Whether all weights of a folder are pickles."""
    return any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors"))


def shapes(file: Path, key: str) -> dict[str, list[int]]:
    """Read the names and shapes of the tensors in a .safetensors file, without the tensors.

    Raises:
        UserError: the file is damaged.
    """
    if not file.is_file():
        raise UserError(f"{key}.name: {file} is not a file")
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{key}.name: cannot load {file}: {error}") from error


def limit_of_folder(folder: Path, key: str) -> AbstractContextManager[None]:
    """`weight_limit` for the weights in a folder.

    Raises:
        UserError: a file of weights is damaged.
    """
    files = [file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin") and file.is_file()]
    known = sum(len(shapes(file, key)) for file in files if file.suffix == ".safetensors")
    pickled = any(file.suffix == ".bin" for file in files)
    # A tensor with all experts may become a module for each expert, and the other way round.
    tensors = 200_000 if pickled else 1000 + 100 * known
    elements = PER_BYTE * sum(file.stat().st_size for file in files) + SPARE
    return weight_limit(elements, tensors, f"{key}.name: {folder / CONFIG}")


@contextmanager
def weight_limit(elements: int, tensors: int, what: str) -> Iterator[None]:
    """Limit the weights of the models that are built within the block.

    A config may describe a model that no memory holds, or a loop that does not end. transformers builds a model on the
    meta device before it reads the weights: the count stops the building there, before it costs anything.

    Args:
        elements: most elements of parameters and buffers, together.
        tensors: most parameters.
        what: names the file that describes the model.

    Raises:
        UserError: a model is larger.
    """
    counted = [0, 0]

    def count(module: nn.Module, name: str, tensor: Tensor | None, parameters: int) -> None:
        """Count a parameter or a buffer that a module registers."""
        if tensor is None or tensor.device.type != "meta":
            return
        counted[0] += tensor.numel()
        counted[1] += parameters
        if counted[0] > elements or counted[1] > tensors:
            raise UserError(
                f"{what} describes a larger model than its weights are of: at {type(module).__name__}.{name} "
                f"it has {counted[1]} weights with {counted[0]:.3g} elements"
            )

    handles = [
        torch_module.register_module_parameter_registration_hook(partial(count, parameters=1)),
        torch_module.register_module_buffer_registration_hook(partial(count, parameters=0)),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def check_weights(model: nn.Module, where: str) -> None:
    """Check that all weights are finite.

    Raises:
        UserError: names the first weight that is not, and how many there are.
    """
    if wrong := [name for name, weight in model.named_parameters() if not _finite(weight)]:
        raise UserError(f"{where}: the weights hold NaN or infinity: {first_and_more(wrong)}; get the model again")


def _finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel() or weight.itemsize < 2 or weight.is_meta:
        return True  # packed in 8 bits or fewer: what was quantized was finite
    low, high = weight.aminmax()  # NaN in, NaN out; nothing as large as the weight is allocated
    return bool(low.isfinite() and high.isfinite())


def first_and_more(names: list[str]) -> str:
    """The first of some names, and how many follow."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def explain(error: BaseException) -> str:
    """The first lines of a library's message, with the class of the error where the text alone says too little."""
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines[:3])
    plain = isinstance(error, OSError | ValueError | ImportError)
    return text if plain and text else f"{type(error).__name__}: {text}"
