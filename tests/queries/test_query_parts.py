"""How documents are cut into chunks and parts."""

import itertools

import pytest

from opcd.queries.documents import Document
from opcd.queries.parts import chunks
from opcd.runtime.errors import UserError

MANUAL = """# The Kestrel 40 Radio

The Kestrel 40 was built in
2017. It weighs 3 kg. Dr. Ash designed it. Yes.

## Care

- Clean it with a dry cloth.
- Never put it in water,
  for the speaker is made of paper.

| part | price |
|---|---|
| knob | 4 crowns |
"""


def words(text: str) -> int:
    return len(text.split())


def parts_of(text: str, most: int = 1000) -> list:
    return [part for chunk in chunks([Document("radio.md", text)], most, words) for part in chunk.parts]


def test_sentences_items_and_rows_are_parts():
    assert [part.text for part in parts_of(MANUAL)] == [
        "The Kestrel 40 was built in 2017.",  # a line that begins with a number is no list
        "It weighs 3 kg.",
        "Dr. Ash designed it. Yes.",  # an abbreviation ends no sentence, and a word alone is none
        "Clean it with a dry cloth.",
        "Never put it in water, for the speaker is made of paper.",
        "| part | price |",
        "| knob | 4 crowns |",
    ]


def test_a_part_knows_its_subject_and_the_sentence_before():
    first, second, _, fourth, *_ = parts_of(MANUAL)
    assert first.subject == "The Kestrel 40 Radio"
    assert fourth.subject == "The Kestrel 40 Radio"
    assert second.passage == "The Kestrel 40 was built in 2017. It weighs 3 kg."
    assert fourth.passage == fourth.text  # an item of a list stands alone
    assert [first.name, second.name] == ["radio.md/1/1", "radio.md/1/2"]


def test_a_text_without_a_title_is_about_its_most_frequent_name():
    text = "You are the guide of Mount Juniper.\n- Mount Juniper is high.\n- Martha Vale climbs it."
    assert {part.subject for part in parts_of(text)} == {"Mount Juniper"}


def test_chunks_fit_overlap_by_a_paragraph_and_hold_every_part_once():
    text = "\n\n".join(f"Paragraph {n} says that there are {n} birds." for n in range(10))
    cut = chunks([Document("birds.txt", text)], 30, words)
    assert len(cut) > 2 and all(words(chunk.text) <= 30 for chunk in cut)
    for one, other in itertools.pairwise(cut):
        assert one.text.split("\n\n")[-1] == other.text.split("\n\n")[0]
    asked = [part.text for chunk in cut for part in chunk.parts]
    assert asked == [f"Paragraph {n} says that there are {n} birds." for n in range(10)]
    assert all(part.text in cut[part.chunk].text for chunk in cut for part in chunk.parts)


def test_what_fits_is_one_chunk_of_all_documents():
    (chunk,) = chunks([Document("a.txt", "Ash is a tree."), Document("b.txt", "Elm is a tree.")], 100, words)
    assert chunk.text == "Ash is a tree.\n\nElm is a tree."
    assert [part.name for part in chunk.parts] == ["a.txt/1/1", "b.txt/1/2"]


def test_a_paragraph_that_is_too_long_is_named():
    with pytest.raises(UserError, match=r"a paragraph of long\.txt has 52 tokens and --chunk_tokens is 20"):
        chunks([Document("long.txt", "word " * 50)], 20, words)


def test_every_chunk_stands_below_its_documents_title():
    text = "# The Heron Inn: rules\n\n" + "\n\n".join(f"## Room {n}\n\nIt has {n} beds and a lamp." for n in range(6))
    cut = chunks([Document("inn.md", text), Document("b.md", "Elm is a tree of the park.")], 30, words)
    assert len(cut) > 2 and all(words(chunk.text) <= 30 for chunk in cut)
    assert all(chunk.text.startswith("# The Heron Inn: rules\n\n## Room") for chunk in cut[:-1])
    assert all(chunk.text.count("The Heron Inn") == 1 for chunk in cut)
    assert [part.text for chunk in cut for part in chunk.parts][:2] == [
        "It has 0 beds and a lamp.",
        "It has 1 beds and a lamp.",
    ]
