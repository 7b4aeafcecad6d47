"""The contexts that the teacher sees: one for the data set, one per example, or one drawn from a list."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from opcd.data.example import ANCHORS, Example
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import check_text, read_json, read_jsonl, read_text, require_file, suffix_of


def read_contexts(source: str | list[str], key: str = "data.context") -> list[str]:
    """The contexts of a file or of a list, without white space around them.

    Args:
        source: a .json file with a list of texts, a .jsonl file with one text or {"context": text} per line, or a file
            with any other suffix, which is one context; or a list of the texts themselves.
        key: the config key of the source, for messages.

    Raises:
        UserError: the file cannot be read, or a context is empty, not text, or the name of a file.
    """
    if not isinstance(source, str):
        return _listed(source, key)
    file = require_file(source, key)
    found: list[tuple[str, object]]
    if suffix_of(file) == ".jsonl":
        found = [(at, row.get("context") if isinstance(row, dict) else row) for at, row in read_jsonl(file, key)]
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
        raise UserError(f"{key}: {path} holds {len(contexts)} contexts; name a file with one context")
    return contexts[0]


def context_hash(contexts: Sequence[str]) -> str:
    """SHA-256, in hex, of the contexts in their order: identifies them in a model card without their text."""
    digest = hashlib.sha256()
    for context in contexts:
        content = context.encode()
        digest.update(len(content).to_bytes(8, "big") + content)  # ["ab"] and ["a", "b"] must differ
    return digest.hexdigest()


class ContextSource:
    """Gives each example its context: its own, or one of the data set's, drawn if there are several.

    Args:
        contexts: the data set's contexts. None: each example must have its own.
        seed: seed of the draw.
    """

    def __init__(self, contexts: list[str] | None, seed: int) -> None:
        self.contexts = contexts or []
        self.seed = seed

    def candidates(self, example: Example) -> list[str]:
        """Every context that the example can get; an anchor gets none."""
        if example.teacher == ANCHORS:
            return []
        return self.contexts if example.context is None else [example.context]

    def context_for(self, example: Example, epoch: int) -> str | None:
        """The context of an example in an epoch; None if there is none.

        The draw depends on (seed, epoch, example.index) only: workers, ranks and the order of calls do not change it.
        """
        candidates = self.candidates(example)
        return random.Random(f"{self.seed}/{epoch}/{example.index}").choice(candidates) if candidates else None

    def check(self, splits: Mapping[str, Sequence[Example]], complete: bool = True) -> None:
        """Check that every example has a context (rows to predict need none), and that data.context has a use.

        Args:
            splits: the examples of each split.
            complete: whether these are all examples of the config; others could use the data set's contexts.

        Raises:
            UserError: names the first row without a context, or data.context.
        """
        for example in (example for split, rows in splits.items() if split != "predict" for example in rows):
            if not self.candidates(example):
                raise UserError(f"{example.source}: no context: give the row one, or set data.context")
        own = all(example.context is not None for rows in splits.values() for example in rows)
        if complete and self.contexts and own:
            raise UserError("data.context has no effect: every row has a context of its own; remove one of the two")


def _listed(texts: list[str], key: str) -> list[str]:
    found = [_context(text, f"{key}, context {number}", key) for number, text in enumerate(texts, start=1)]
    if not found:
        raise UserError(f"{key}: the list has no contexts")
    for text in found:
        if "\n" not in text and len(text) < 256 and Path(text).expanduser().is_file():
            raise UserError(
                f"{key}: {text} is a file, and its text is expected here; give the file itself to data.context without "
                "a list, and to opcd.distill as a pathlib.Path"
            )
    return found


def _context(value: object, source: str, key: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{source}: a context ({key}) must be text")
    if not value.strip():
        raise UserError(f"{source}: the context ({key}) is empty")
    check_text(value, f"{source}: the context ({key})")
    return value.strip()
