"""What leaves for people: control characters are escaped, secrets are masked, and output that fails ends no run.

`opcd` installs `clean_output` around every command, so that whatever is printed, logged or raised passes `shown`.
What draws on a terminal with rich uses a `Screen`, which cleans the text and keeps its own colours and moves.
"""

import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
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
"""What a terminal acts on, or shows as nothing. Joiners stay: emoji and several scripts need them."""
BREAKS = re.compile(r"[\t\n]")
USER = re.compile(
    r"(?<=://)(?:[^\s/\"'<>]{1,256}@|[^\s/:\"'<>]{1,256}:(?!\d{1,5}/)[^\s\"'<>]{0,256}@)"  # bounded: linear time
)
"""Who an address is opened as, with the password; also one that holds a slash, and is no port."""
QUERY = re.compile(r"([?&](?:access_token|token|api_?key|key|password|secret|signature|sig)=)[^\s&\"'<>]+", re.I)
"""A key in the query of an address."""
NAMED = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD)$", re.I)
"""Variables of the environment that hold a key."""
ADDRESSES = ("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
SHORTEST = 8
"""Characters of a key in the environment; a shorter text would mask words."""
UP = re.compile(r"(\x1b\[A)+")
"""How tqdm goes to the bar above."""
FORMULA = re.compile(r"\s*[=+\-@\uff1d\uff0b\uff0d\uff20].|[\t\r]", re.DOTALL)
"""How a cell begins that a spreadsheet may run, also in letters of full width."""
MARKUP = re.compile(r"[\\`*\[\]<>&|~$!#]|(?<!\w)_|_(?!\w)")
ENTITIES = {"<": "&lt;", ">": "&gt;", "&": "&amp;"}

_secrets: frozenset[str] = frozenset()


def shown(text: object, lines: bool = True) -> str:
    """The text as people may see it: control characters as `\\x1b` or `\\u202e`, keys and passwords as ***.

    Args:
        lines: keep tabs and line breaks; off, for a name that stands in a line.
    """
    clean = masked(str(text)).replace("\r\n", "\n")
    clean = CONTROL.sub(_escaped, clean)
    return clean if lines else BREAKS.sub(_escaped, clean)


def masked(text: str) -> str:
    """The text without passwords in addresses, and without every secret that `hide` was told."""
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, MASK)
    if "://" in text:
        text = USER.sub(f"{MASK}@", text)
    return QUERY.sub(rf"\g<1>{MASK}", text)


def hide(secret: str) -> None:
    """Mask a text from now on, wherever it is shown, also as JSON or Python would quote it."""
    global _secrets
    forms = (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1], unquote(secret))
    _secrets = _secrets | {form for form in forms if len(form.strip()) > 3}  # a new set: other threads read the old one


def hide_environment(environment: Mapping[str, str]) -> None:
    """Mask the keys and the passwords of addresses that the environment holds."""
    for name, value in environment.items():
        if NAMED.search(name) and len(value) >= SHORTEST and not value.startswith(("/", "~", ".")):  # no file
            hide(value.strip())
    for name in ADDRESSES:
        with suppress(ValueError):
            password = urlsplit(environment.get(name, "")).password or ""
            hide(password if len(password) >= SHORTEST else "")  # a shorter one is masked in its address


def plain(text: object) -> Text:
    """Text for rich in which nothing is markup, an emoji's name or a control character."""
    return Text(_encodable(shown(text), getattr(sys.stdout, "encoding", None) or "utf-8"))


def csv_cell(value: object) -> str:
    """A cell of a CSV file: what a spreadsheet would run as a formula begins with an apostrophe; numbers stay."""
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
    """The same as code, in a fence longer than any within; a bar would end a cell also there."""
    line = shown(text, lines=False)
    fence = "`" * (max((len(run) for run in re.findall(r"`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}".replace("|", "\\|")


def _escaped(found: re.Match[str]) -> str:
    return ascii(found[0])[1:-1]


class Screen(Console):
    """A console that shows text as `shown` does, and characters that the terminal's encoding lacks as escapes."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Text of a string, cleaned before it is laid out."""
        return super().render_str(self._fitting(shown(text)), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The pieces of anything, cleaned, but for rich's own control codes."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else piece._replace(text=self._fitting(shown(piece.text)))

    def set_live(self, live: Live) -> bool:
        """Let other output pass above what is drawn in place."""
        _screens.append(self)
        return super().set_live(live)

    def clear_live(self) -> None:
        """End this."""
        super().clear_live()
        _screens.remove(self)

    def _fitting(self, text: str) -> str:
        return _encodable(text, self.encoding)


_screens: list[Screen] = []
"""Those that draw in place now."""


class _Tolerant(io.TextIOBase):
    """A stream whose failures end nothing: what cannot be written is left out.

    Args:
        stream: where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed: Exception | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return getattr(self.stream, "encoding", None) or "utf-8"

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What the stream does with characters that its encoding lacks."""
        return getattr(self.stream, "errors", None)

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has, such as its buffer."""
        return getattr(self.stream, name)

    def writable(self) -> bool:
        """Always; what is written may be lost."""
        return True

    def fileno(self) -> int:
        """The stream's descriptor."""
        return self.stream.fileno()

    def isatty(self) -> bool:
        """Whether a person looks at it."""
        return self.failed is None and not self.stream.closed and self.stream.isatty()

    def write(self, text: str) -> int:
        """Write what the encoding has, the rest as escapes."""
        self._try(lambda: self.stream.write(_encodable(text, self.encoding)))
        return len(text)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.failed is not None:
            return
        try:
            action()
        except BlockingIOError:
            pass  # a reader that is slow: this piece is lost
        except (OSError, ValueError) as error:  # a closed pipe, a full disk; ValueError: closed in Python
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Write nothing more. What the stream still holds goes nowhere, so that Python can end without a complaint."""
        self.failed = error
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)


class _Clean(FileProxy):
    """A stream that shows what it is given as `shown` does.

    rich takes it for its own proxy: consoles write below it, and no `Live` puts another one over it.

    Args:
        stream: where to.
        bars: whether tqdm's bars come this way; their returns to the beginning of a line stay.
    """

    def __init__(self, stream: TextIO, bars: bool) -> None:
        self.below = _Tolerant(stream)
        file = cast(IO[str], self.below)
        super().__init__(Screen(file=file), file)
        self.bars = bars
        self._begun = ""

    def __getattr__(self, name: str) -> Any:
        """Whatever else the stream has."""
        return getattr(self.below, name)

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's encoding."""
        return self.below.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        """What the stream does with characters that its encoding lacks."""
        return self.below.errors

    def writable(self) -> bool:
        """Always; what is written may be lost."""
        return True

    def write(self, text: str) -> int:
        """Show a text, above what a screen draws in place."""
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
        """Hand on what is buffered."""
        if self._begun and not _screens:
            self.below.write(shown(self._begun))
            self._begun = ""
        self.below.flush()


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return text.encode(encoding, "backslashreplace").decode(encoding)
    except LookupError:
        pass
    return text


@cache
def _nowhere(descriptor: int) -> TextIO:
    """The null device, also at a descriptor that is free: the next file would get it, and with it what is printed."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    try:
        os.fstat(descriptor)
    except OSError:
        os.dup2(nowhere, descriptor)
    return os.fdopen(nowhere, "r" if descriptor == 0 else "w", encoding="utf-8")


def install() -> None:
    """Have all that this process prints and logs cleaned, from now on.

    A standard stream that was closed before Python began goes nowhere, so that no file gets its number.
    """
    if not isinstance(sys.stdout, _Clean):
        hide_environment(os.environ)
        os.environ.setdefault("PYTHON_COLORS", "0")  # from 3.13 on Python itself colours tracebacks and --help
        sys.stdin = sys.stdin or _nowhere(0)
        sys.stdout, sys.stderr = _Clean(sys.stdout or _nowhere(1), False), _Clean(sys.stderr or _nowhere(2), True)


@contextmanager
def clean_output() -> Iterator[None]:
    """`install` for a while; all the same where it is installed already."""
    former = sys.stdout, sys.stderr
    install()
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = former


def finish_output() -> bool:
    """Hand on what is buffered; False where standard output could not be written, which standard error then says.

    A reader that has gone (`opcd ... | head`) wants no more: nothing is lost.
    """
    sys.stdout.flush()
    error = getattr(sys.stdout, "failed", None)
    lost = error is not None and not isinstance(error, BrokenPipeError)
    if lost:
        print(f"opcd: standard output cannot be written: {error}", file=sys.stderr)
    sys.stderr.flush()
    return not lost
