"""A record: a folder with responses of a teacher or a student, and the teacher's likeliest tokens at their positions.

Rows are written one shard at a time, `shard-00000.safetensors`, then `record.json`, which lists the shards with their
SHA-256 and the origin of the record. A process that is killed loses only the shard that it was writing.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import (
    clear_scratch,
    explained,
    put_in_place,
    removed_on_failure,
    require_own,
    scratch_beside,
    write_atomic,
)
from opcd.runtime.files.user_files import read_json

INDEX = "record.json"


@dataclass(frozen=True)
class Origin:
    """What a record was made from; a run that reads it is compared with it."""

    teacher: str
    """Name of the teacher's model."""
    tokenizer: str
    """`tokenizer_hash`."""
    context: str
    """SHA-256 of the context, or of all contexts."""
    rows: int
    """Number of examples in the data set."""
    samples: int
    """Responses to each example."""
    temperature: float
    """Divides the logits before the log-probabilities."""
    k: int
    """Recorded tokens at each position."""
    sampling: dict[str, Any]
    """How the responses were drawn."""
    seed: int
    """The seed of the draws."""
    student: str | None = None
    """Name of the student's model if it wrote the responses, without the context; None: the teacher wrote them."""


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of the vocabulary: equal hashes mean equal token ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def prompt_hash(prompt: Tensor) -> str:
    """SHA-256 of a prompt's token ids [Q]."""
    return hashlib.sha256(prompt.cpu().to(torch.int64).numpy().tobytes()).hexdigest()


class RecordWriter:
    """Writes the shards of a record, or continues one.

    Args:
        folder: of the record.
        origin: what it is made from.

    Raises:
        UserError: the folder holds a record of another origin, or files that belong to no record.
    """

    def __init__(self, folder: Path, origin: Origin) -> None:
        self.folder, self.origin = folder, origin
        self.shards: list[dict[str, Any]] = []
        if (folder / INDEX).exists():
            there, self.shards = _read_index(folder)
            if there != origin and self.shards:
                differ = [name for name, value in asdict(origin).items() if asdict(there)[name] != value]
                raise UserError(f"{folder} holds a record with another {', '.join(differ)}; give --out a new folder")
        else:
            require_own(folder, "--out")
        with explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
            clear_scratch(folder)
        self._write_index()  # before any shard: the index marks the folder as a record

    @property
    def rows(self) -> int:
        """The number of rows that are written."""
        return sum(shard["rows"] for shard in self.shards)

    def add(self, prompts: list[Tensor], responses: list[Tensor], tokens: Tensor, log_probs: Tensor) -> None:
        """Write a shard: B prompts [Q], B responses [R], and [N, k] ids and nats for the N tokens of all responses."""
        name = f"shard-{len(self.shards):05}.safetensors"
        values = {
            "lengths": torch.tensor([len(response) for response in responses]),
            "responses": torch.cat(responses).to("cpu", torch.int32),
            "tokens": tokens.to("cpu", torch.int32),
            "log_probs": log_probs.to("cpu", torch.float32),
        }
        scratch, needed = scratch_beside(self.folder / name), sum(value.nbytes for value in values.values())
        with explained(self.folder / name, needed), removed_on_failure(scratch):
            save_file(values, scratch, {"prompts": json.dumps([prompt_hash(prompt) for prompt in prompts])})
            with scratch.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())  # the index, which is, must not outlive it
            put_in_place(scratch, self.folder / name)
        self.shards.append({"file": name, "rows": len(responses), "sha256": digest})
        self._write_index()

    def _write_index(self) -> None:
        write_atomic(self.folder / INDEX, json.dumps({"origin": asdict(self.origin), "shards": self.shards}, indent=1))


class Record:
    """A finished record, for reading.

    Args:
        folder: of the record.
        key: the config key of the folder, for messages.

    Raises:
        UserError: the record is missing, damaged or unfinished.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.origin, shards = _read_index(folder, key)
        if (rows := sum(shard["rows"] for shard in shards)) < self.origin.rows * self.origin.samples:
            raise UserError(
                f"{key}: {folder} holds {rows} of {self.origin.rows * self.origin.samples} responses; "
                "run `opcd record` with the same arguments to continue"
            )
        self._shards = [self._verified(shard) for shard in shards]
        self._places: dict[str, list[tuple[int, int, int]]] = {}  # prompt -> (shard, begin, end)
        for number, shard in enumerate(shards):
            with safe_open(folder / shard["file"], "pt") as file:
                prompts = json.loads(file.metadata()["prompts"])
            ends = self._shards[number]["lengths"].cumsum(0).tolist()
            for prompt, begin, end in zip(prompts, [0, *ends], ends, strict=False):
                self._places.setdefault(prompt, []).append((number, begin, end))

    def draw(self, prompt: Tensor) -> Tensor:
        """A recorded response [R] to a teacher's prompt of token ids [Q], drawn if there are several.

        Raises:
            UserError: there is none.
        """
        places = self._found(prompt)
        number, begin, end = places[int(torch.randint(len(places), ()))]
        return self._shards[number]["responses"][begin:end].long().to(prompt.device)

    def top_k(self, prompt: Tensor, response: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids and log-probabilities, [R, k] each, at the positions of a recorded response [R]."""
        for number, begin, end in self._found(prompt):
            shard = self._shards[number]
            if torch.equal(shard["responses"][begin:end].long(), response.cpu()):
                return shard["tokens"][begin:end].long(), shard["log_probs"][begin:end]
        raise UserError(
            f"{self.key}: a response is not in {self.folder}; use RecordedRollout with this folder, which takes the "
            "recorded ones"
        )

    def _found(self, prompt: Tensor) -> list[tuple[int, int, int]]:
        places = self._places.get(prompt_hash(prompt))
        if places is None:
            raise UserError(
                f"{self.key}: a prompt is not in {self.folder}: data, context, placement, template or tokenizer differ "
                "from the recorded ones"
            )
        return places

    def _verified(self, shard: dict[str, Any]) -> dict[str, Tensor]:
        path = self.folder / shard["file"]
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{self.key}: cannot read {path}: {error.strerror}") from error
        if digest != shard["sha256"]:
            raise UserError(f"{self.key}: {path} is damaged (its SHA-256 differs); record it again")
        return load_file(path)


def read_origin(folder: Path, key: str) -> Origin:
    """The origin of a record, without reading its shards (UserError if there is no record)."""
    return _read_index(folder, key)[0]


def _read_index(folder: Path, key: str = "--out") -> tuple[Origin, list[dict[str, Any]]]:
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{key}: no record in {folder.absolute()}: {INDEX} is missing (`opcd record` makes one)")
    index: Any = read_json(path, key)
    try:
        return Origin(**index["origin"]), list(index["shards"])
    except (TypeError, KeyError) as error:
        raise UserError(f"{key}: {path} is not the index of a record: {error}") from error
