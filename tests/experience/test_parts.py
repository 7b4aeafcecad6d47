"""Reading lessons, growing lists, choosing, prompts, and the file that survives a kill."""

import json

import pytest

from opcd.experience.experience_folder import PROMPTS
from opcd.experience.lessons import Growth, LessonList, read_lessons
from opcd.experience.selection import Score, best, best_of_each, to_score
from opcd.runtime.errors import UserError
from opcd.writing.claimed_folder import claim
from opcd.writing.journal import Journal
from opcd.writing.prompt_files import Prompt

EXTRACT = PROMPTS / "extract.txt"


@pytest.mark.case("B8")
@pytest.mark.timeout(30)
@pytest.mark.parametrize("text", ["\n" * 300_000, "\n*" * 200_000, " " * 300_000, "- LESSON" * 50_000, "*\t" * 200_000])
def test_lessons_are_read_in_linear_time(text):
    assert read_lessons(text, "LESSON:") == []
    assert read_lessons(f"{text}\n- LESSON: Check units.", "LESSON:") == ["Check units."]


@pytest.mark.case("B8")
@pytest.mark.timeout(60)
def test_a_list_that_is_flooded_is_cut_without_counting_every_list():
    counted = []
    growth = Growth(" ".join, lambda text: counted.append(text) or len(text.split()), max_tokens=50, near=None)
    grown = growth(LessonList(0), [f"lesson{number}" for number in range(2000)])
    assert grown.lessons == tuple(f"lesson{number}" for number in range(1950, 2000))
    assert grown.dropped == tuple(f"lesson{number}" for number in range(1950))
    assert len(counted) < 2000 + 20


@pytest.mark.parametrize(
    ("text", "lessons"),
    [
        ("LESSON: Check units.", ["Check units."]),
        ("- LESSON: Check units.\n  * lesson:  Draw   it. ", ["Check units.", "Draw it."]),
        ("1. **LESSON:** Check units.\n2) **LESSON: Draw it.**\n> LESSON: So.", ["Check units.", "Draw it.", "So."]),
        ("## LESSON: Check.\n• LESSON: Draw.", ["Check.", "Draw."]),
        ("A LESSON: not at the beginning", []),
        ("LESSON:\nLESSON: ...\nLESSONS: none\n", []),
        ("<think>LESSON: no\nLESSON: no</think>LESSON: yes", ["yes"]),
        ("LESSON: a line\r\nLESSON: b", ["a line", "b"]),
    ],
)
def test_reading(text, lessons):
    assert read_lessons(text, "LESSON:") == lessons


def growth(max_tokens: int = 100, near: float | None = 0.9) -> Growth:
    return Growth(render="\n".join, count=lambda text: len(text.split()), max_tokens=max_tokens, near=near)


def test_duplicates_are_joined():
    grown = growth()(LessonList(0), ["Check the units.", "check, the UNITS", "Check the sign."])
    assert grown.lessons == ("Check the units.", "Check the sign.") and grown.seen == (2, 1)
    one = "Always write the known numbers on one line before you begin."
    other = one.replace("begin", "start")
    assert growth(near=0.9)(LessonList(0), [one, other]).joined == ((other, one),)
    assert growth(near=None)(LessonList(0), [one, other]).lessons == (one, other)


def test_the_oldest_whole_lessons_go():
    before = growth(5)(LessonList(0), ["one two", "three four five"])
    after = growth(5)(before, ["six seven", "a b c d e f"])
    assert after.lessons == ("three four five", "six seven") and after.tokens == 5
    assert after.dropped == ("one two",) and after.too_long == ("a b c d e f",)
    assert after.step == 2 and after.id != before.id


def score(number: int, step: int, right: int, tokens: int) -> Score:
    version = LessonList(number, step, ("x",), (1,), f"{number}{tokens}", tokens)
    return Score.of(version, [True] * right + [False] * (4 - right))


def test_ties_go_to_the_shorter_list():
    scores = [Score.of(None, [True] * 4), score(0, 1, 3, 9), score(0, 2, 3, 7), score(1, 1, 3, 8), score(1, 2, 2, 1)]
    assert (best(scores).number, best(scores).step) == (0, 2)  # and never the prompt without a list
    assert [(s.number, s.step) for s in best_of_each(scores)] == [(0, 2), (1, 1)]


def test_an_empty_list_is_no_candidate():
    versions = [LessonList(0, 1), LessonList(0, 2, ("x",), (1,), "x", 1), LessonList(0, 3, ("x",), (1,), "x", 1)]
    assert [version.step for version in to_score(versions, 1)] == [2, 3]
    assert [version.step for version in to_score(versions, 2)] == [2, 3]
    with pytest.raises(UserError, match="no list was scored"):
        best([Score.of(None, [True])])


def test_a_journal_cut_anywhere_goes_on_with_whole_batches(tmp_path):
    batches = [[{"n": 1}, {"n": 2}], [{"n": 3}], [{"n": 4}, {"n": "ü\n"}, {"n": 6}]]
    whole = Journal(tmp_path / "whole.jsonl")
    for batch in batches:
        whole.append(batch)
    content = whole.path.read_bytes()
    ends = [0, *(content.index(line) + len(line) for line in (b"[1, 2]}\n", b"[0, 1]}\n", b"[2, 3]}\n"))]
    for cut in range(len(content)):
        file = tmp_path / "cut.jsonl"
        file.write_bytes(content[:cut])
        journal = Journal(file, keep=["n"])
        done = max(number for number, end in enumerate(ends) if end <= cut)
        assert file.stat().st_size == ends[done]
        assert [r["n"] for r in journal.records] == [r["n"] for batch in batches[:done] for r in batch]
        for batch in batches[done:]:
            journal.append(batch)
        assert file.read_bytes() == content and journal.records == [{"n": r["n"]} for r in whole.records]


def test_a_journal_that_somebody_changed(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"n": 1, "batch": [0, 1]}\nnonsense\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not a record of this run"):
        Journal(file)
    assert file.read_text().endswith("nonsense\n")  # nothing is thrown away


def test_prompts(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("{{ transcript }} {{ marker }}\n")
    prompt = Prompt(
        PROMPTS / "extract.txt", str(file), "extract.prompt", {"transcript", "marker"}, {"transcript", "marker"}
    )
    assert prompt(transcript="{{ marker }} <b>", marker="L:") == "{{ marker }} <b> L:"  # data is no template
    for text, message in (
        ("{{ transcript }}", "lacks marker"),
        ("{{ transcript }}{{ marker }}{{ answer }}", "unknown name answer"),
        ("{% if %}", "Expected an expression"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=f"extract.prompt: .*{message}"):
            Prompt(
                PROMPTS / "extract.txt", str(file), "extract.prompt", {"transcript", "marker"}, {"transcript", "marker"}
            )


def test_the_prompts_of_the_package():
    known = {"transcript", "outcome", "lessons", "marker"}
    extract = Prompt(EXTRACT, None, "extract.prompt", known, known)
    text = extract(transcript="T", outcome="O", lessons=["one", "two"], marker="LESSON:")
    assert "\nHow it went: O\n" in text and "LESSON: one\nLESSON: two\n" in text
    bare = extract(transcript="T", outcome=None, lessons=[], marker="LESSON:")
    assert "How it went" not in bare and "known already" not in bare and "\n\n\n" not in bare
    assert json.dumps(bare)


@pytest.mark.case("E1")
@pytest.mark.parametrize("name", ["context.txt", "attempts.jsonl"])
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path, name):
    """Such as the folder of `opcd init`, whose context.txt would be overwritten."""
    (tmp_path / name).write_text("mine, without a line break")
    with pytest.raises(UserError, match=f"out: .*did not write there .{name}"):
        claim(tmp_path, {"seed": 0})
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine, without a line break"]
