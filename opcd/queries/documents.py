"""Documents as plain text: text and Markdown as they are; HTML, PDF and DOCX through markitdown."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zipfile import is_zipfile

from opcd.runtime.errors import UserError
from opcd.runtime.extras import require
from opcd.runtime.files.user_files import check_text, read_text, require_file, suffix_of

CONVERTED = (".html", ".htm", ".pdf", ".docx")
KEY = "--context"


@dataclass(frozen=True)
class Document:
    """A document.

    Attributes:
        name: of its file.
        text: without white space around it.
    """

    name: str
    text: str


def read_documents(files: Sequence[str], key: str = KEY) -> list[Document]:
    """Read documents in the order of their files.

    Raises:
        UserError: a file is not there, is empty, holds no text, or two have one name.
    """
    paths = [require_file(file, key) for file in files]
    for number, path in enumerate(paths):
        if path.name in [other.name for other in paths[:number]]:
            raise UserError(f"{key}: two files are called {path.name}; rename one")
    return [_read(path, key) for path in paths]


def _read(path: Path, key: str) -> Document:
    suffix = suffix_of(path)
    text = _converted(path, key) if suffix in CONVERTED else read_text(path, key)
    if not text.strip():
        scanned = "; a scanned PDF must go through text recognition (OCR) first" if suffix == ".pdf" else ""
        raise UserError(f"{key}: {path} holds no text{scanned}")
    check_text(text, f"{key}: {path}")
    return Document(path.name, text.strip())


def _converted(path: Path, key: str) -> str:
    require("documents", "markitdown", f"{key}: {path}")
    from markitdown import MarkItDown
    from markitdown._exceptions import MarkItDownException

    try:
        is_pdf = b"%PDF" in path.read_bytes()[:1024]
        if (path.suffix == ".pdf" and not is_pdf) or (path.suffix == ".docx" and not is_zipfile(path)):
            raise ValueError("its content is of another kind")  # markitdown would take it for text
        return str(MarkItDown(enable_plugins=False).convert_local(str(path)).text_content)
    except (MarkItDownException, OSError, ValueError) as error:
        raise UserError(f"{key}: {path} cannot be read as {path.suffix[1:].upper()}: {_first(error)}") from error


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
