"""How documents are cut: into chunks that fit a model's window, and each chunk into parts to ask about."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from opcd.queries.documents import Document
from opcd.runtime.errors import UserError

HEADING = re.compile(r"\s*#{1,6}\s+(?P<title>.+?)\s*#*\s*$")
BULLET = re.compile(r"^\s*([-*+]|\d{1,2}[.)])\s+(?=\S)")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'\u201d\u2019)]*\s+(?=[\"'\u201c\u2018(]?[A-Z0-9\u00c0-\u00de])")
ABBREVIATION = re.compile(r"\b(Mr|Mrs|Ms|Dr|Prof|St|No|Nr|vs|etc|approx|e\.g|i\.e|[A-Z])\.$")
NAME = re.compile(r"[A-Z\u00c0-\u00de]\w+(?: [A-Z\u00c0-\u00de]\w+)+")
LEAST_WORDS = 4
"""Words of a sentence that is a part of its own; a shorter one belongs to the sentence before it."""

CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Part:
    """A sentence or a list item: what one question is about.

    Attributes:
        name: document, chunk and number, such as "manual.md/2/14". Parts are held out as a whole.
        chunk: the number of its chunk.
        subject: what the document is about: its title up to a colon, or its most frequent name.
        passage: the part behind the sentence before it, which often says what it is about.
        text: the part itself.
    """

    name: str
    chunk: int
    subject: str
    passage: str
    text: str


@dataclass(frozen=True)
class Chunk:
    """A piece of the documents that fits a prompt, below its document's title; neighbours overlap by a paragraph."""

    text: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class _Paragraph:
    document: str
    subject: str
    above: str
    """Stands above it where a chunk begins with it: the title, which says what the text is about."""
    text: str


def chunks(documents: Sequence[Document], most_tokens: int, count: CountTokens) -> list[Chunk]:
    """Cut documents at paragraphs into chunks of at most `most_tokens`.

    Documents that fit together are one chunk: the context as a whole. Else each chunk begins with the last paragraph of
    the one before, where both fit. A part belongs to the first chunk that holds it.

    Raises:
        UserError: a paragraph alone is longer than `most_tokens`.
    """
    paragraphs = [paragraph for document in documents for paragraph in _paragraphs(document)]
    sizes = [count(paragraph.text) + 2 for paragraph in paragraphs]
    above = {text: count(text) for text in {paragraph.above for paragraph in paragraphs}}
    first = [size + above[paragraph.above] for paragraph, size in zip(paragraphs, sizes, strict=True)]
    for paragraph, size in zip(paragraphs, first, strict=True):
        if size > most_tokens:
            raise UserError(
                f"--context: a paragraph of {paragraph.document} has {size} tokens and --chunk_tokens is {most_tokens} "
                f"(it begins with {paragraph.text[:60]!r}); raise --chunk_tokens, or break the paragraph up"
            )
    groups: list[list[int]] = [[]]
    for number, size in enumerate(sizes):
        if groups[-1] and first[groups[-1][0]] + sum(sizes[n] for n in groups[-1][1:]) + size > most_tokens:
            last = groups[-1][-1]
            groups.append([last] if first[last] + size <= most_tokens else [])
        groups[-1].append(number)
    found, known = [], -1
    for number, group in enumerate(groups):
        own = [paragraphs[n] for n in group if n > known]
        known = group[-1]
        text = paragraphs[group[0]].above + "\n\n".join(paragraphs[n].text for n in group)
        found.append(Chunk(text, tuple(_parts(own, number))))
    return found


def _paragraphs(document: Document) -> list[_Paragraph]:
    """Paragraphs; a heading stands with the paragraph that follows it."""
    # The model asks about the heading of a section, not about the sentence, where it sees both.
    title, pending, subject = "", "", _name(document)
    found: list[_Paragraph] = []
    for block in re.split(r"\n\s*\n", document.text):
        lines = block.strip("\n").split("\n")
        while lines and (match := HEADING.match(lines[0])):
            title = title or match["title"]
            pending = f"{pending}{lines.pop(0).strip()}\n\n"
        if not "".join(lines).strip():
            continue
        above = f"# {title}\n\n" if title and title not in pending else ""
        text = pending + "\n".join(lines).strip()
        found.append(_Paragraph(document.name, title.partition(":")[0] or subject, above, text))
        pending = ""
    return found


def _name(document: Document) -> str:
    """What a document without a title is about: the name of several words that stands in it most often."""
    found = Counter(NAME.findall(document.text)).most_common(1)
    return found[0][0] if found else Path(document.name).stem.replace("_", " ")


def _parts(paragraphs: Sequence[_Paragraph], chunk: int) -> list[Part]:
    found: list[Part] = []
    for paragraph in paragraphs:
        passage = "\n".join(line for line in paragraph.text.split("\n") if not HEADING.match(line)).strip()
        before = ""
        for item in _items(passage):
            for text in _sentences(item):
                name = f"{paragraph.document}/{chunk + 1}/{len(found) + 1}"
                found.append(Part(name, chunk, paragraph.subject, f"{before} {text}".strip(), text))
                before = text
            before = "" if _is_list(passage) else before
    return found


def _items(passage: str) -> list[str]:
    """List items, rows of tables, or the passage as one."""
    items: list[str] = []
    for line in passage.split("\n"):
        if items and line.strip() and not BULLET.match(line) and not line.lstrip().startswith("|"):
            items[-1] += " " + line.strip()  # a line that was wrapped
        elif line.strip() and not re.fullmatch(r"[\s|:\-=_*]+", line):
            items.append(BULLET.sub("", line).strip())
    return items


def _is_list(passage: str) -> bool:
    return any(BULLET.match(line) or line.lstrip().startswith("|") for line in passage.split("\n"))


def _sentences(item: str) -> list[str]:
    """The sentences of an item; a short one, or one that an abbreviation cut off, belongs to the one before."""
    whole: list[str] = []
    for sentence in SENTENCE_END.split(item):
        if whole and ABBREVIATION.search(whole[-1]):
            whole[-1] += " " + sentence
        else:
            whole.append(sentence.strip())
    found = whole[:1]
    for sentence in whole[1:]:
        if len(sentence.split()) < LEAST_WORDS:
            found[-1] += " " + sentence
        else:
            found.append(sentence)
    return [sentence for sentence in found if len(re.findall(r"\w+", sentence)) >= 2]
