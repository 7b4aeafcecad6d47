"""The contexts that the teacher sees: one for the data set, one an example, or one drawn from a list."""

import hashlib
import random
from collections.abc import Mapping, Sequence

from opcd.data.example import Example
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import check_text, read_json, read_jsonl, read_text, require_file, suffix_of


def read_contexts(path: str, key: str = "data.context") -> list[str]:
    """The contexts of a file, without white space around them.

    Args:
        path: a .json file with a list of texts, a .jsonl file with one text or {"context": text} a line, or a file with
            any other suffix, which is one context.
        key: the config key that holds the path, for messages.

    Raises:
        UserError: the file cannot be read, or a context in it is empty or no text.
    """
    file = require_file(path, key)
    found: Sequence[tuple[str, object]]
    if suffix_of(file) == ".jsonl":
        found = [(source, _unwrap(value)) for source, value in read_jsonl(file, key)]
    elif suffix_of(file) == ".json":
        value = read_json(file, key)
        if not isinstance(value, list):
            raise UserError(f"{key}: {file} must hold a list of texts")
        found = [(f"{file}: entry {number}", entry) for number, entry in enumerate(value, start=1)]
    else:
        found = [(str(file), read_text(file, key))]
    if not found:
        raise UserError(f"{key}: {file} has no contexts")
    return [_context(value, source, key) for source, value in found]


def read_context(path: str, key: str) -> str:
    """The only context of a file, as `read_contexts` reads it.

    Raises:
        UserError: the file cannot be read, or holds several.
    """
    contexts = read_contexts(path, key)
    if len(contexts) > 1:
        raise UserError(f"{key}: {path} holds {len(contexts)} contexts, and one is wanted here; name a file with one")
    return contexts[0]


def context_hash(contexts: Sequence[str]) -> str:
    """SHA-256, in hex, of the contexts in their order: names them in a model card without their text."""
    digest = hashlib.sha256()
    for context in contexts:
        content = context.encode()
        digest.update(len(content).to_bytes(8, "big") + content)  # with the length: ["ab"] and ["a", "b"] must differ
    return digest.hexdigest()


class ContextSource:
    """Gives each example its context: its own, else the only one of the data set, else one drawn from the list.

    Args:
        contexts: the data set's contexts; None: each example must have its own.
        seed: seed of the draw.
    """

    def __init__(self, contexts: list[str] | None, seed: int) -> None:
        self.contexts = contexts or []
        self.seed = seed

    def candidates(self, example: Example) -> list[str]:
        """Every context that the example can get."""
        return self.contexts if example.context is None else [example.context]

    def context_for(self, example: Example, epoch: int) -> str | None:
        """The context of an example in an epoch; None where there is none.

        The draw depends on (seed, epoch, example.index) only: workers, ranks and the order of calls do not change it.
        """
        candidates = self.candidates(example)
        if not candidates:
            return None
        return random.Random(f"{self.seed}/{epoch}/{example.index}").choice(candidates)

    def check(self, splits: Mapping[str, Sequence[Example]], complete: bool = True) -> None:
        """Refuse an example without a context (rows to predict need none), and contexts that no example uses.

        Args:
            splits: the examples of each split.
            complete: these are all examples of the config; others could use the data set's contexts.

        Raises:
            UserError: names the first such row, or data.context.
        """
        examples = [example for split in splits.values() for example in split]
        for example in (example for split, rows in splits.items() if split != "predict" for example in rows):
            if not self.candidates(example):
                raise UserError(f"{example.source}: no context: give the row one, or set data.context")
        if complete and self.contexts and all(example.context is not None for example in examples):
            raise UserError("data.context has no effect: every row has a context of its own; remove one of the two")


def _unwrap(value: object) -> object:
    return value.get("context") if isinstance(value, dict) else value


def _context(value: object, source: str, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{source}: a context ({key}) must be text")
    if not value.strip():
        raise UserError(f"{source}: the context ({key}) is empty")
    check_text(value, f"{source}: the context ({key})")
    return value.strip()
