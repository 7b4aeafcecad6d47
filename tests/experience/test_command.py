"""`opcd experience` and `opcd show` as users call them, with the packaged model and without."""

import json
import re
import shutil

import pytest

from opcd.cli.pages.show import make_page, print_run
from tests.helpers.paths import ROOT
from tests.helpers.rows import read_rows, sums, write_rows

CONFIG = "configs/experience_math.yaml"


@pytest.fixture
def paths(tmp_path) -> list[str]:
    """Words that name two training and two validation rows, and the folder."""
    train, val = write_rows(tmp_path / "t.jsonl", sums([1, 2])), write_rows(tmp_path / "v.jsonl", sums([3, 4]))
    files = ["--problems.init_args.train", str(train), "--problems.init_args.val", str(val)]
    return ["--config", CONFIG, *files, "--out", str(tmp_path / "out")]


def sampling(tokens: int) -> list[str]:
    """Greedy and short, in every stage."""
    greedy = f"{{max_new_tokens: {tokens}, temperature: 0, top_p: 1.0, top_k: 0}}"
    return [f"--{stage}.sampling={greedy}" for stage in ("solve", "extract", "select")]


@pytest.mark.slow
def test_the_packaged_model_from_problems_to_a_context(opcd, paths, tmp_path):
    """Greedy, with a prompt that a small model follows; the second call computes nothing."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{{ transcript }}\n\nRepeat this line and write no more:\n{{ marker }} Check the units.")
    words = [*paths, *sampling(32), "--extract.prompt", prompt, "--lists=1"]
    code, text = opcd("experience", *words)
    assert code == 0, text
    out = tmp_path / "out"
    assert (out / "context.txt").read_text().startswith("Lessons from earlier attempts. Use those that fit:\n- ")
    assert len(read_rows(out / "attempts.jsonl")) == 2 and "of 2 right" in text
    files = ("attempts.jsonl", "extractions.jsonl", "validation.jsonl", "scores.jsonl", "context.txt")
    before = {name: (out / name).read_bytes() for name in files}
    assert opcd("experience", *words)[0] == 0
    assert before == {name: (out / name).read_bytes() for name in files}
    code, text = opcd("show", out)
    assert code == 0 and "report.html" in text and "list 0" in text


def test_the_packaged_model_writes_no_marked_line(opcd, paths, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("{{ transcript }}{{ marker if lessons }}")  # there are none: it never learns of the marker
    for _ in range(2):  # the answers are kept: the second time no model is asked
        code, text = opcd("experience", *paths, *sampling(8), "--extract.prompt", prompt)
        assert code == 2 and "no lessons: none of the 4 answers" in text and "extract.sampling" in text, text
        assert "Traceback" not in text
    assert not (tmp_path / "out" / "context.txt").exists()
    code, text = opcd("show", tmp_path / "out")
    assert code == 0 and "not finished: 4 lines in attempts.jsonl, 4 lines in extractions.jsonl" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps=3"], "steps: each list learns from 3 training items, but problems has 2"),
        (["--lists=0"], "lists must be at least 1, got 0"),
        (["--problems.init_args.limit_val=0"], "limit_val must be at least 1"),
        (["--problems.init_args.val=EMPTY"], "problems.init_args.val: {tmp}/empty.jsonl has no rows"),
        (["--problems.init_args.val=SAME"], "2 of 2 validation items are training items too"),
        (["--problems.init_args.val=BARE"], "bare.jsonl:1: no answer to compare with"),
        (["--problems.init_args.val=missing.jsonl"], "problems.init_args.val: no file"),
        (["--extract.prompt=missing.txt"], "extract.prompt: no file"),
        (["--extract.prompt=PROMPT"], "extract.prompt: {tmp}/prompt.txt: lacks transcript"),
        (["--extract.marker= "], "extract.marker is empty"),
        (["--lessons.near=1.5"], "lessons.near must be between 0 and 1"),
        (["--select.every=0"], "select.every must be at least 1"),
        (["--template={context}{query}"], "template has no effect with placement: system"),
        (["--model=nowhere"], "model.name: no model 'nowhere'"),
        (["--extract.model.name=nowhere"], "extract.model.name: no model 'nowhere'"),
        (["--rounds=1"], "rounds distil: set fit.config"),
        (["--fit.set={trainer.max_steps: 1}"], "fit has no effect without rounds"),
        (["--rounds=2", "--model=smollm2-135m", "--fit.set={}"], "would never solve while model is set"),
        (["--rounds=1", "--fit.set={data.context: a}"], "fit.set: data.context is set by each round"),
        (["--rounds=1", "--fit.set={data.trian: a}"], "'data.trian' is no config key; did you mean data.train?"),
        (["--rounds=1", "--fit.set={trainer.max_steps: 1}"], "data.train is not set"),
        (["--rounds=1", "--placement=user", "--fit.set={data.train: SAME}"], "data.placement of fit is 'system'"),
        (["--device=cuda:99"], "device: cuda:99"),
        (["--solve.sampling.temperature=-1"], "temperature >= 0"),
        (["--solve.smpling.temperature=1"], "smpling"),
    ],
)
def test_bad_input_ends_with_2_and_leaves_nothing(opcd, paths, tmp_path, words, message):
    write_rows(tmp_path / "empty.jsonl", [])
    write_rows(tmp_path / "bare.jsonl", [{"query": "What is 9 + 9?"}])
    (tmp_path / "prompt.txt").write_text("{{ marker }}")
    files = {"EMPTY": "empty.jsonl", "SAME": "t.jsonl", "BARE": "bare.jsonl", "PROMPT": "prompt.txt"}
    for name, file in files.items():
        words = [word.replace(name, str(tmp_path / file)) for word in words]
    code, text = opcd("experience", *paths, *words)
    assert code == 2 and message.format(tmp=tmp_path) in text, text
    assert "Traceback" not in text and not (tmp_path / "out").exists()


def test_show_wants_a_run(opcd, tmp_path):
    code, text = opcd("show", tmp_path)
    assert code == 2 and "is no run of `opcd experience`" in text


def test_the_page(scripted):
    out = scripted()
    page = make_page(out)
    assert "list 1 after 3 steps (2 lessons, 43 tokens): 5 of 5 right" in page
    assert "<svg" in page and "without lessons" in page and "(written" not in page
    assert "What is 5 + 5?" in page and "&lt;think&gt;" in page  # an attempt and what was extracted, as text
    assert not re.search(r"(src|href)=\"?http|url\((?!#)|@import|<script|<link[^>]+http", page)  # needs no network
    assert page == make_page(out)


def test_a_lesson_is_text_on_the_page_and_the_screen(scripted, capsys):
    out = scripted()
    (out / "lists.jsonl").write_text((out / "lists.jsonl").read_text().replace("An odd", "<b>[red]An odd"))
    assert "<li>&lt;b&gt;[red]An odd" in make_page(out)
    print_run(out)
    assert "<b>[red]An odd" in capsys.readouterr().out


def test_the_config_is_what_the_folder_keeps(scripted):
    identity = json.loads((scripted("--seed=3") / "run.json").read_text())
    assert identity["seed"] == 3 and identity["problems"]["class_path"] == "opcd.experience.MathProblems"
    assert "LESSON" not in identity["text of extract.prompt"] and "{{ marker }}" in identity["text of extract.prompt"]


SHIPPED = ROOT / "benchmarks" / "results" / "experience"


@pytest.mark.case("C18")
@pytest.mark.parametrize("gone", [(), ("scores.jsonl",), ("context.txt",), ("selection.json",)], ids=str)
def test_show_shows_what_is_there(opcd, tmp_path, gone):
    run = tmp_path / "run"
    run.mkdir()
    for name in {"run.json", "context.txt", "scores.jsonl", "selection.json"} - set(gone):
        shutil.copy(SHIPPED / name, run)
    code, text = opcd("show", run)
    assert code == 0, text
    page = (run / "report.html").read_text()
    assert ("Understand the problem thoroughly" in text) == ("context.txt" not in gone)
    assert ("Understand the problem thoroughly" in page) == ("context.txt" not in gone)
    assert "21 of 64" in text  # in the line of the selection, or in the table
    assert ("not finished" in text) == ("selection.json" in gone)


@pytest.mark.case("C18")
@pytest.mark.parametrize("name", ["selection.json", "scores.jsonl", "lists.jsonl", "run.json"])
def test_show_names_a_folder_that_holds_something_else(opcd, tmp_path, name):
    run = tmp_path / "run"
    shutil.copytree(SHIPPED, run)
    (run / name).write_text('{"number": ["a"]}\n' if name != "run.json" else "{")
    code, text = opcd("show", run)
    assert "Traceback" not in text and f"{name}:" in text.replace("\n", " ")
    assert code == 0, text  # the rest is shown


@pytest.mark.case("C19")
def test_show_renews_its_own_page_and_overwrites_no_other(opcd, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(SHIPPED, run)
    assert opcd("show", run)[0] == 0 and opcd("show", run)[0] == 0
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    code, text = opcd("show", run, "--page", mine)
    assert code == 2 and "--page" in text and "exists already" in text and mine.read_text() == "mine"
