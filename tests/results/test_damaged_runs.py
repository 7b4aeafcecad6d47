"""Runs that were killed, and folders that somebody has changed: what is whole is shown, what is not is named."""

import json
import random
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from opcd.results.plots import bars, curves, drawn, points
from opcd.results.run_files import figures, read_config, read_metrics
from opcd.runtime.errors import UserError
from opcd.sweep.job_engine import Task
from opcd.sweep.jobs import Job, JobFolder
from opcd.sweep.summary import ArmResult, write_summary
from opcd.sweep.sweep_plan import make_arm
from tests.helpers.task_rows import scored_rows

CONFIG = "trainer:\n  max_steps: 3\nmodel:\n  student: {name: tiny}\ndata: {batch_size: 2}\n"
METRICS = "epoch,step,train/divergence,seconds/step\r\n0,0,3.0,1.0\r\n0,1,2.0,1.0\r\n0,2,1.0,2.0\r\n"
SAMPLES = "".join(
    json.dumps({"step": step, "query": "Who?", "reference": "5", "context": context, "answer": f"it is {step}."}) + "\n"
    for step in (0, 5)
    for context in (False, True)
)
RESULT = {"tasks": {"dapo_math": {"n": 2, "metrics": {"accuracy": {"value": 0.5, "low": 0.1, "high": 0.9}}}}}
ANSWERS = "".join(json.dumps(row) + "\n" for row in scored_rows([True], [False]))
FILES = {
    "config.yaml": CONFIG,
    "metrics.csv": METRICS,
    "samples.jsonl": SAMPLES,
    "environment.json": json.dumps({"command": "opcd fit", "began": "now", "machine": {"memory": "1"}, "versions": {}}),
    "results/results.json": json.dumps(RESULT),
    "eval/step=3-dapo_math.jsonl": ANSWERS,
}
NOT_JSON, OTHER = "no JSON object", "another type"


def make(folder: Path, **files: str | bytes) -> Path:
    for name, text in (FILES | files).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def sample(**changes):
    return json.dumps(json.loads(SAMPLES.splitlines()[0]) | changes) + "\n"


DAMAGE = {
    "a line of metrics cut": ("metrics.csv", METRICS + "0,3,0.", "metrics.csv:5: left out"),
    "a line of metrics cut in its last number": ("metrics.csv", METRICS + "0,3,0.5,1", "metrics.csv:5: left out"),
    "a header alone": ("metrics.csv", "epoch,step,tr", "metrics.csv:1: left out"),
    "NaN": ("metrics.csv", METRICS + "0,3,nan,1\n0,4,nan,1\n", "train/divergence is nan at step 3 and at 1 more"),
    "inf": ("metrics.csv", METRICS + "0,3,inf,inf\n", "seconds/step is inf at step 3"),
    "no number": ("metrics.csv", METRICS + "0,3,abc,1\n", "train/divergence is no number, but 'abc'"),
    "no step": ("metrics.csv", METRICS + "0,x,1,1\n", "metrics.csv:5: left out: it has no step"),
    "a huge step": ("metrics.csv", METRICS + "0,1e300,1,1\n", "it has no step"),
    "huge numbers": ("metrics.csv", METRICS + "0,3,1e308,1e308\n0,4,1e308,1e308\n", "is 1e+308 at step 3"),
    "cells too many": ("metrics.csv", METRICS + "0,3,1,1,1,1\n", "metrics.csv:5: left out"),
    "a huge cell": ("metrics.csv", METRICS + '0,3,"' + "x" * 200_000 + '",1\n', "metrics.csv:5: left out"),
    "bytes in metrics": ("metrics.csv", METRICS.encode() + b"\0\xff\n", "metrics.csv:5: left out"),
    "metrics that are a folder": ("metrics.csv/x", "", None),
    "a sample cut": ("samples.jsonl", SAMPLES + SAMPLES[:50], "samples.jsonl:5: left out: no JSON object"),
    "a sample that is a list": ("samples.jsonl", SAMPLES + "[1]\n", "samples.jsonl:5: left out"),
    "a deep sample": ("samples.jsonl", SAMPLES + "[" * 100_000 + "\n", "samples.jsonl:5: left out"),
    "a sample without a step": ("samples.jsonl", SAMPLES + "{}\n", "step, query, reference, context, answer missing"),
    "a step that is a text": ("samples.jsonl", SAMPLES + sample(step="3"), "step missing, or of another type"),
    "an answer that is a number": ("samples.jsonl", SAMPLES + sample(answer=3), "answer missing, or of another type"),
    "a reference that is a list": ("samples.jsonl", SAMPLES + sample(reference=[1]), "reference missing, or of"),
    "a step of 400 digits": ("samples.jsonl", SAMPLES + sample(step=10**400), "step missing, or of another type"),
    "bytes in samples": ("samples.jsonl", SAMPLES.encode() + b"\xff\xfe\0\n", "samples.jsonl:5: left out"),
    "a config cut": ("config.yaml", CONFIG + "  x: [1, ", "config.yaml: left out"),
    "a config that is a list": ("config.yaml", "[1]", "no config of a run, but list"),
    "an empty config": ("config.yaml", "", "no config of a run, but NoneType"),
    "a config of aliases": (
        "config.yaml",
        "a0: &a0 [x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
        "aliases stand for more than 50000 values",
    ),
    "a config that holds itself": ("config.yaml", "a: &a [*a]\n", "an anchor holds an alias of itself"),
    "a deep config": ("config.yaml", "a: " + "[" * 5000, "config.yaml: left out"),
    "a huge integer": ("config.yaml", "a: " + "9" * 5000, "config.yaml: left out"),
    "a config that is no text": ("config.yaml", b"a: \xff\n", "config.yaml: left out"),
    "a trainer that is a text": ("config.yaml", "trainer: x\n2000-01-01: 2000-01-01\n", None),
    "an environment cut": ("environment.json", '{"command": "op', "environment.json: left out: not valid JSON"),
    "an environment that is a list": ("environment.json", "[]", "environment.json: left out: no JSON object"),
    "an empty environment": ("environment.json", "", "environment.json: left out: it is empty"),
    "machine a list": ("environment.json", '{"machine": [], "began": 3}', "began, machine of another type"),
    "machine of lists": ("environment.json", '{"machine": {"a": [1]}, "versions": {"b": null}}', None),
    "results cut": ("results/results.json", '{"tasks"', "results/results.json: left out"),
    "results of a list": ("results/results.json", "[]", "results/results.json: left out"),
    "tasks of a list": ("results/results.json", '{"tasks": []}', "results/results.json: left out: it has no tasks"),
    "a task of a list": ("results/results.json", '{"tasks": {"a": []}}', "a is of another shape"),
    "a value of a text": (
        "results/results.json",
        '{"tasks": {"a": {"n": 1, "metrics": {"x": {"value": "y"}}}}}',
        "another shape",
    ),
    "results of NaN": (
        "results/results.json",
        '{"tasks": {"a": {"n": 1, "metrics": {"x": {"value": NaN}}}}}',
        None,
    ),
    "no answers": ("eval/step=3-dapo_math.jsonl", "", "0 of 0 answers have their scores"),
    "an answer cut": ("eval/step=3-dapo_math.jsonl", ANSWERS + ANSWERS[:20], "step=3-dapo_math.jsonl:3: left out"),
    "an answer without a score": (
        "eval/step=3-dapo_math.jsonl",
        ANSWERS + '{"index": 7, "query": "q"}\n',
        "2 of 3 answers",
    ),
    "a score of a text": (
        "eval/step=3-dapo_math.jsonl",
        ANSWERS + '{"index": 7, "query": "q", "right": "x"}\n',
        "2 of 3 answers",
    ),
    "answers of odd counts": (
        "eval/step=3-dapo_math.jsonl",
        "".join(json.dumps(row) + "\n" for row in scored_rows([True, True], [True] * 5)),
        "left out: pass@k needs",
    ),
}


@pytest.mark.case("B4")
@pytest.mark.parametrize("name", DAMAGE)
def test_a_report_shows_what_is_whole_and_names_what_is_not(opcd, tmp_path, name, monkeypatch):
    file, text, said = DAMAGE[name]
    if not file.startswith("metrics"):
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # curves take the most of the time
    run = make(tmp_path / "run", **{file.partition("/")[0]: ""} if file.startswith("metrics.csv/") else {file: text})
    other = make(tmp_path / "other")
    code, printed = opcd("report", run, other, "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0
    if said is not None:
        assert said in printed, printed
        assert 'id="problems"' in page
    assert "Who?" in page
    if not file.startswith("metrics"):
        assert figures(run)["train/divergence"] == 1.0
    assert figures(run).get("seconds/step", 0) < 1e300


@pytest.mark.case("B4")
def test_a_whole_run_has_no_problems(opcd, tmp_path):
    run = make(tmp_path / "run")
    code, printed = opcd("report", run, "--out", tmp_path / "page.html")
    assert code == 0 and printed == f"page: {tmp_path / 'page.html'}\n"
    assert 'id="problems"' not in (tmp_path / "page.html").read_text()


@pytest.mark.case("B4")
def test_bytes_changed_at_random_end_in_a_page(opcd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    draw = random.Random(0)
    for number in range(60):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        file = draw.choice(list(FILES))
        data = bytearray(FILES[file].encode())
        for _ in range(draw.randint(1, 6)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        run = make(tmp_path / "run", **{file: bytes(data[: draw.choice([len(data), draw.randrange(len(data))])])})
        assert opcd("report", run, "--out", tmp_path / f"{number}.html")[0] == 0, (file, bytes(data))


@pytest.mark.case("B4")
def test_a_summary_of_damaged_runs(tmp_path):
    lines = {
        "whole": METRICS,
        "cut": METRICS + "0,3,0.",
        "nan": METRICS + "0,3,nan,1.0\r\n",
        "inf": METRICS + "0,3,-inf,inf\r\n",
    }
    results = []
    for seed, (name, text) in enumerate(lines.items()):
        folder = JobFolder(tmp_path, Job(f"arms/{name}", ["fit"], {}, "done"))
        make(folder.run, **{"metrics.csv": text, "samples.jsonl": SAMPLES + "{"})
        task = Task(Job(f"arms/{name}", ["fit"], {}, "done"), folder, status="finished", seconds=1.0)
        results.append(ArmResult.of(make_arm({"seed_everything": seed}, name=name), task))
    write_summary(tmp_path, results)
    text = (tmp_path / "summary.md").read_text()
    assert "metrics.csv:5: left out" in text and "train/divergence is nan at step 3" in text
    assert text.count("samples.jsonl:5: left out") == 4


@pytest.mark.case("B4")
@pytest.mark.parametrize("file", ["job.json", "finished.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seconds": "x"}', "\xff", '{"seconds": null, "config": 1}'])
def test_the_marks_of_a_finished_arm_that_cannot_be_read_are_one_message(tmp_path, file, text):
    folder = JobFolder(tmp_path, Job("arms/a", ["fit"], {}, "done"))
    folder.begin()
    folder.finish(2.0)
    assert folder.seconds() == 2.0
    (folder.path / file).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="arms/a"):
        folder.seconds()


@pytest.mark.case("B5")
@pytest.mark.parametrize("name", ["$x$", "a$\\frac{1", "_hidden", "a\x1b[2J\nb\u202e", "港務 ✓", "<b>&", "{}%", "^_~"])
def test_names_are_plain_text_in_plots(name):
    lines = {name: [[(0, 1.0), (1, float("nan")), (2, 2.0)], [(0, 1e308), (1, 3.0)]], "b": [[(0, float("inf"))]]}
    for draw in (
        lambda axes: curves(axes, lines),
        lambda axes: bars(axes, {name: [1.0, float("nan")], "b": [float("inf")]}),
        lambda axes: points(axes, {name: [(1.0, 2.0), (float("nan"), 1.0)], "b": [(float("inf"), 1.0)]}),
    ):
        svg = ElementTree.fromstring(drawn(draw, name, name, name, name))
        text = "".join(svg.itertext())
        assert text.count(name[:2].strip("\x1b\n") if name.isprintable() else "a\\x1b[2J\\nb\\u202e") >= 3


@pytest.mark.case("B5")
def test_a_report_of_a_folder_with_dollars(opcd, tmp_path):
    run = make(tmp_path / "$run$_{", **{"metrics.csv": METRICS.replace("train/divergence", "train/$x^{")})
    other = make(tmp_path / "b$")
    assert opcd("report", run, other, "--out", tmp_path / "page.html")[0] == 0
    assert "train/$x^{" in (tmp_path / "page.html").read_text()


@pytest.mark.case("B4", "A11")
def test_a_config_that_cannot_be_read_is_one_message(tmp_path):
    for name in ("a config cut", "a config that is a list", "a config of aliases", "a huge integer"):
        (tmp_path / "config.yaml").write_text(DAMAGE[name][1])
        with pytest.raises(UserError, match=r"config\.yaml"):
            read_config(tmp_path)


def test_metrics_that_are_not_logged(tmp_path):
    assert read_metrics(tmp_path) == {}
