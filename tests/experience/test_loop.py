"""The whole loop with a scripted model: lists, scores and choice are known in advance."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from opcd.data import read_contexts
from opcd.runtime.errors import UserError
from tests.helpers.paths import ROOT
from tests.helpers.rows import read_rows, sums, write_rows
from tests.helpers.scripted import EVEN, ODD

GUESS, READ, MUCH = "Never guess.", "Read the question twice.", ODD.replace("needs care", "needs much care")
FILES = (
    *("attempts.jsonl", "extractions.jsonl", "validation.jsonl", "lists.jsonl", "scores.jsonl"),
    *("context.txt", "contexts.jsonl", "selection.json"),
)


def numbers(folder: Path) -> list[list[int]]:
    """The number in each item of each list, by steps."""
    found: list[list[int]] = [[], []]
    for record in read_rows(folder / "attempts.jsonl"):
        found[record["list"]].append(int(record["transcript"].split("What is ")[1].split()[0]))
    return found


def test_the_lists_grow_as_the_answers_say(scripted):
    out = scripted()
    # The orders of the draw; what the extractor writes about each number stands in scripted.ANSWERS.
    assert numbers(out) == [[5, 6, 3, 4], [1, 3, 2, 5]]
    lists = read_rows(out / "lists.jsonl")
    assert [entry["lessons"] for entry in lists if entry["number"] == 0] == [
        [MUCH],
        [MUCH, GUESS],
        [MUCH, GUESS],  # nothing to learn
        [GUESS, EVEN.upper(), READ],  # the oldest went: over the limit, as a whole
    ]
    assert [entry["lessons"] for entry in lists if entry["number"] == 1] == [[ODD], [ODD], [ODD, EVEN], [ODD, EVEN]]
    assert lists[3]["dropped"] == [MUCH] and lists[3]["added"] == [EVEN.upper(), READ]
    assert lists[7]["joined"] == [[MUCH, ODD]] and lists[7]["seen"] == [2, 1]
    assert all(entry["tokens"] <= 60 for entry in lists)


def test_score_k_belongs_to_list_k_and_the_last_list_has_one(scripted):
    out = scripted()
    scores = [(s["number"], s["step"], s["right"]) for s in read_rows(out / "scores.jsonl")]
    assert scores == [
        (None, None, 0),
        *((0, 1, 1), (0, 2, 1), (0, 3, 1), (0, 4, 4)),
        *((1, 1, 1), (1, 2, 1), (1, 3, 5), (1, 4, 5)),
    ]
    by_step = {(entry["number"], entry["step"]): entry["id"] for entry in read_rows(out / "lists.jsonl")}
    assert all(s["id"] == by_step[s["number"], s["step"]] for s in read_rows(out / "scores.jsonl")[1:])
    # A list is measured once, however often it stands unchanged: 5 texts and none at all, 5 items each.
    asked = Counter((r["id"], r["item"]) for r in read_rows(out / "validation.jsonl"))
    assert len(asked) == 30 and set(asked.values()) == {1}


def test_the_best_list_is_a_context_that_fit_takes(scripted):
    out = scripted()
    selection = json.loads((out / "selection.json").read_text())
    assert (selection["number"], selection["step"], selection["right"], selection["right_without"]) == (1, 3, 5, 0)
    (context,) = read_contexts(str(out / "context.txt"))
    assert context == f"Lessons from earlier attempts. Use those that fit:\n- {ODD}\n- {EVEN}"
    several = read_contexts(str(out / "contexts.jsonl"))
    assert len(several) == 2 and several[1] == context and EVEN.upper() in several[0]


def test_fewer_scores(scripted):
    out = scripted("--select.every=3")
    assert [(s["number"], s["step"]) for s in read_rows(out / "scores.jsonl")] == [
        (None, None),
        *((0, 3), (0, 4), (1, 3), (1, 4)),
    ]


def test_what_the_extractor_is_shown(scripted, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{{ transcript }} {{ marker }}{% for l in lessons %} known: {{ l }}{% endfor %} {{ outcome }}")
    seen = []

    def spy(prompt: str) -> None:
        seen.append(prompt)

    from tests.helpers.scripted import ScriptedWriter

    plain = ScriptedWriter._text
    ScriptedWriter._text = lambda self, text, context: (
        (self.stage == "extract" and spy(text)) or plain(self, text, context)
    )
    try:
        scripted("--extract.prompt", str(prompt), "--extract.show_earlier=true", "--extract.show_outcome=true")
        shown, seen[:] = list(seen), []
        scripted(out="plain")
    finally:
        ScriptedWriter._text = plain
    assert len(shown) == len(seen) == 8
    assert all("The final answer is wrong." in text for text in shown)
    # Prompts come by steps, a list after the other: list 1 had learnt ODD from its first item, and nothing since.
    assert [text.count("known:") for text in shown] == [0, 0, 1, 1, 2, 1, 2, 2]
    assert f"known: {ODD}" in shown[3] and f"known: {MUCH}" in shown[2]
    assert not any("known" in text.replace("known already", "") or "wrong" in text for text in seen)


def test_another_seed_draws_other_items(scripted):
    assert numbers(scripted("--seed=1", out="other")) != numbers(scripted())


@pytest.mark.slow
def test_kill_9_at_every_stage_and_resume(scripted, words, tmp_path):
    """Killed seven times, in every stage and in the middle of files, the run ends with the same bytes."""
    expected = scripted()
    out, calls = tmp_path / "killed", tmp_path / "killed-calls.txt"
    environment = os.environ | {"SCRIPTED_CALLS": str(calls), "PYTHONPATH": str(ROOT)}
    kills = ["solve:2", "extract:2", "lists.jsonl", "select:5", "scores.jsonl", "context.txt", "selection.json"]
    for kill in [*kills, "never:0"]:
        command = [sys.executable, "-m", "tests.helpers.scripted", "--kill", kill, "--", *words, "--out", str(out)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == (0 if kill == "never:0" else -signal.SIGKILL), done.stderr
        if kill in ("solve:2", "select:5"):  # and the machine went down in the middle of a line
            file = out / ("attempts.jsonl" if kill == "solve:2" else "validation.jsonl")
            with file.open("ab") as stream:
                stream.write(b'{"list": 0, "step')
    for name in FILES:
        assert (out / name).read_bytes() == (expected / name).read_bytes(), name
    once, again = (Counter((tmp_path / f"{name}-calls.txt").read_text().split()) for name in ("out", "killed"))
    assert again - once == Counter({"solve": 1, "extract": 1, "select": 1})  # the three calls that were killed


def test_a_finished_run_computes_nothing(scripted, tmp_path):
    out = scripted()
    before = {name: (out / name).read_bytes() for name in FILES}
    calls = (tmp_path / "out-calls.txt").read_text()
    scripted()
    assert (tmp_path / "out-calls.txt").read_text() == calls
    assert before == {name: (out / name).read_bytes() for name in FILES}


def test_a_folder_of_another_run_is_refused(scripted, tmp_path):
    scripted()
    with pytest.raises(UserError, match=r"differs in solve.sampling.temperature, lessons.near; choose another --out"):
        scripted("--lessons.near=null", "--solve.sampling.temperature=0.5")
    write_rows(tmp_path / "val.jsonl", sums([10, 12]))
    with pytest.raises(UserError, match="differs in validation items"):
        scripted()


def test_every_lesson_over_the_limit(scripted):
    with pytest.raises(UserError, match=r"lessons.max_tokens: no lesson fits into 8 tokens.*raise it"):
        scripted("--lessons.max_tokens=8")


def test_a_model_that_writes_no_marked_line(scripted, tmp_path):
    with pytest.raises(UserError) as refused:
        scripted("--extract.marker", "RULE:")
    message = str(refused.value)
    assert "none of the 8 answers" in message and "'RULE:'" in message and "extract.prompt" in message
    assert message.count("care with the last digit") == 2  # two samples: those of the numbers 5 and 1
    assert not (tmp_path / "out" / "context.txt").exists()
