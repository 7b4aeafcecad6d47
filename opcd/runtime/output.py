"""Text for people: control characters are escaped, secrets are masked, and output that fails does not end a run.

`opcd` runs every command inside `clean_output`, so that all text that is printed, logged or raised passes `shown`.
Code that draws on a terminal with rich uses a `Screen`, which cleans the text and keeps rich's colours and moves.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import IO, Any, TextIO, cast
from urllib.parse import unquote, urlsplit

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.segment import Segment
from rich.text import Text

MASK = "***"
CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and line feed, DEL, C1
    "\u061c\u200e\u200f\u2028-\u202e\u2061-\u206f\ufeff\ufff9-\ufffb"  # directions, breaks, invisible marks
    "\ud800-\udfff\U000e0000-\U000e007f]"  # halves of pairs, as in names of files that are no UTF-8; tags
)
"""Characters that a terminal acts on, or does not show. Joiners stay: emoji and several scripts need them."""
BREAKS = re.compile(r"[\t\n]")
USER = re.compile(
    r"(?<=://)(?:[^\s/\"'<>]{1,256}@|[^\s/:\"'<>]{1,256}:(?!\d{1,5}/)[^\s\"'<>]{0,256}@)"  # bounded: linear time
)
"""The user and the password in an address. A password may hold a slash; a port is no password."""
QUERY = re.compile(r"([?&](?:access_token|token|api_?key|key|password|secret|signature|sig)=)[^\s&\"'<>]+", re.I)
"""A key in the query of an address."""
NAMED = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)
"""Variables of the environment that hold a key."""
ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
SHORTEST = 8
"""Least characters of a key in the environment: a shorter one would mask words."""
UP = re.compile(r"(\x1b\[A)+")
"""How tqdm moves to the bar above."""
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20].|[\t\r]", re.DOTALL)
"""The beginning of a cell that a spreadsheet may run as a formula, also in full-width letters."""
MARKUP = re.compile(r"[\\`*\[\]<>&|~$!#]|(?<!\w)_|_(?!\w)")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}

_secrets: frozenset[str] = frozenset()


def shown(text: object, lines: bool = True) -> str:
    """The text that people may see: control characters as `\\x1b` or `\\u202e`, keys and passwords as ***.

    Args:
        lines: keep tabs and line breaks; False for a name within a line.
    """
    clean = CONTROL.sub(_escaped, masked(str(text)).replace("\r\n", "\n"))
    return clean if lines else BREAKS.sub(_escaped, clean)


def masked(text: str) -> str:
    """The text without passwords in addresses and without the secrets given to `hide`."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    if "://" in text:
        text = USER.sub(f"{MASK}@", text)
    return QUERY.sub(rf"\g<1>{MASK}", text)


def hide(secret: str) -> None:
    """Mask a secret from now on, also as JSON or Python quotes it."""
    global _secrets
    forms = (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], unquote(secret))
    _secrets = _secrets | {form for form in forms if len(form.strip()) > 3}  # a new set: other threads read the old one


def _hide_environment() -> None:
    """Mask the keys in the environment, and the passwords of its addresses."""
    for name, value in os.environ.items():
        if NAMED.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", ".")):  # no file
            hide(value.strip())
    for name in ADDRESSES:
        with suppress(ValueError):
            password = urlsplit(os.environ.get(name, "")).password or ""
            hide(password if len(password) >= SHORTEST else "")  # a shorter one is masked in its address


def plain(text: object) -> Text:
    """Text for rich in which nothing is markup, an emoji's name or a control character."""
    return Text(_encodable(shown(text), getattr(sys.stdout, "encoding", None)))


def csv_cell(value: object) -> str:
    """A cell of a CSV file. An apostrophe goes before text that a spreadsheet would run as a formula; numbers stay."""
    text = shown(value)  # a bare \r would end the row for some readers
    if not FORMULA.match(text):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def markdown(text: object) -> str:
    """Text for one line or cell of Markdown in which nothing is markup or HTML."""
    line = " ".join(shown(text).split())
    return MARKUP.sub(lambda found: ENTITIES.get(found[0], f"\\{found[0]}"), line)


def markdown_code(text: object) -> str:
    """Text as Markdown code, in a fence longer than any within. Bars are escaped: they would end a table's cell."""
    line = shown(text, lines=False)
    fence = "`" * (max(map(len, re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class Screen(Console):
    """A console that shows text as `shown` does, and characters that the terminal's encoding lacks as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Clean a string, then lay it out."""
        return super().render_str(_encodable(shown(text), self.encoding), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything into clean pieces; rich's own control codes stay."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else piece._replace(text=_encodable(shown(piece.text), self.encoding))

    def set_live(self, live: Live) -> bool:
        """Draw in place from now on; other output passes above."""
        _screens.append(self)
        return super().set_live(live)

    def clear_live(self) -> None:
        """Stop drawing in place."""
        super().clear_live()
        _screens.remove(self)


_screens: list[Screen] = []
"""The screens that draw in place now."""


class _Tolerant:
    """A stream that drops text which cannot be written, and raises nothing."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own, such as its encoding and its buffer."""
        return getattr(self.stream, name)

    def isatty(self) -> bool:
        """Whether the stream is a terminal that still works."""
        return self.failed is None and not self.stream.closed and self.stream.isatty()

    def write(self, text: str) -> int:
        """Write a text; characters that the encoding lacks as escapes."""
        self._try(lambda: self.stream.write(_encodable(text, getattr(self.stream, "encoding", None))))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failed is not None:
            return
        try:
            action()
        except BlockingIOError:
            pass  # a reader that is slow: this piece is lost
        except (OSError, ValueError) as error:  # a closed pipe, a full disk; ValueError: closed in Python
            self.failed = error
            with suppress(OSError, ValueError):  # the null device takes the rest, so that Python ends without a word
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)


class _Clean(FileProxy):
    """A stream that cleans its text with `shown`.

    rich takes it for its own proxy: consoles write below it, and no `Live` puts another one over it.

    Args:
        stream: the stream below.
        bars: whether tqdm writes here; its returns to the beginning of a line stay.
    """

    def __init__(self, stream: TextIO, bars: bool) -> None:
        self.below = _Tolerant(stream)
        file = cast(IO[str], self.below)
        super().__init__(Screen(file=file), file)
        self.bars = bars
        self._begun = ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream below."""
        return getattr(self.below, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What the stream below does with characters that its encoding lacks."""
        return getattr(self.below, "errors", None)

    def writable(self) -> bool:
        """Always True, although text may be lost."""
        return True

    def write(self, text: str) -> int:
        """Write a text, above a screen that draws in place."""
        if self.bars and UP.fullmatch(text):
            self.below.write(text)
        elif self.bars and text.startswith("\r") and "\n" not in text:
            end = "\r" if text.endswith("\r") else ""
            self.below.write(f"\r{shown(text.strip(chr(13)))}{end}")
        elif _screens and self.isatty():
            *whole, self._begun = (self._begun + text).split("\n")
            for line in whole:
                _screens[-1].print(plain(line), soft_wrap=True)
        else:
            self.below.write(shown(self._begun + text))
            self._begun = ""
        return len(text)

    def flush(self) -> None:
        """Write the line that has begun, and flush the stream below."""
        if self._begun and not _screens:
            self.below.write(shown(self._begun))
            self._begun = ""
        self.below.flush()


def _encodable(text: str, encoding: str | None) -> str:
    """The text with escapes for characters that an encoding lacks (None: UTF-8)."""
    with suppress(LookupError):  # an unknown encoding
        return text.encode(encoding or "utf-8", "backslashreplace").decode(encoding or "utf-8")
    return text


@cache
def _nowhere(descriptor: int) -> TextIO:
    """Open the null device. It also takes a descriptor that is free: the next file would get it and the output."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(nowhere, descriptor)
    return os.fdopen(nowhere, "r" if descriptor == 0 else "w", encoding="utf-8")


def install() -> None:
    """Clean all that this process prints and logs from now on.

    The null device replaces a standard stream that was closed before Python began, so that no file gets its number.
    """
    if not isinstance(sys.stdout, _Clean):
        _hide_environment()
        os.environ.setdefault("PYTHON_COLORS", "0")  # from 3.13 on Python itself colours tracebacks and --help
        sys.stdin = sys.stdin or _nowhere(0)
        sys.stdout, sys.stderr = _Clean(sys.stdout or _nowhere(1), False), _Clean(sys.stderr or _nowhere(2), True)


@contextmanager
def clean_output() -> Iterator[None]:
    """`install` within a block."""
    former = sys.stdout, sys.stderr
    install()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = former


def finish_output() -> bool:
    """Flush both streams. Returns False, and says so on standard error, where standard output could not be written.

    A reader that has gone (`opcd ... | head`) is no failure.
    """
    sys.stdout.flush()
    error = getattr(sys.stdout, "failed", None)
    lost = error is not None and not isinstance(error, BrokenPipeError)
    if lost:
        print(f"opcd: standard output cannot be written: {error}", file=sys.stderr)
    sys.stderr.flush()
    return not lost
