"""`opcd report`: the page on two real short runs, read as HTML and in a browser."""

import csv
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from opcd.cli.main import main
from opcd.results.plots import curves, drawn
from opcd.results.run_tables import Run
from opcd.runtime.extras import install_hint
from tests.helpers.browser import check_plots, opened
from tests.helpers.rows import CONTEXT, ROWS, write_rows
from tests.helpers.task_rows import math_rows

TRICKY = {"query": "Is <b>1</b> & 2 a number?", "reference": "yes"}


class Page(HTMLParser):
    """What a page holds.

    Attributes:
        tables: cells by the table's id, a list a row.
        plots: characters of path data in the figure of each metric.
        links: every src and href.
        text: all text outside of tables with an id.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.plots: dict[str, int] = {}
        self.links: list[str] = []
        self.text = ""
        self._table: list[list[str]] | None = None
        self._cell = False
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.links += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        if tag == "table":
            self._table = self.tables.setdefault(values["id"], []) if "id" in values else None
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
            self._cell = True
        elif tag == "figure":
            self.plots[values["aria-label"]] = 0
        elif tag == "path":
            self.plots[[*self.plots][-1]] += len(values["d"])

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        elif tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data):
        if self._cell and self._table:
            self._table[-1][-1] += data
        else:
            self.text += data

    def column(self, table: str, name: str) -> dict[str, str]:
        """A column by the first cell of each row."""
        header, *rows = self.tables[table]
        return {row[0]: row[header.index(name)] for row in rows}


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> list[Path]:
    """Two runs of three steps, of two losses; the second one was evaluated on the way and afterwards."""
    folder = tmp_path_factory.mktemp("report")
    rows, sums = write_rows(folder / "rows.jsonl", [TRICKY, *ROWS]), write_rows(folder / "math.jsonl", math_rows())
    (folder / "context.txt").write_text(CONTEXT)
    evaluation = {"tasks": ["dapo_math"], "data": {"dapo_math": str(sums)}, "limit": 2, "max_new_tokens": 4}
    callback = {"class_path": "opcd.callbacks.LMEval", "init_args": {"evaluation": evaluation, "every_n_steps": 1}}
    (folder / "eval.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [callback]}}))
    shared = (
        *("fit", "--model.student.name", tiny, "--data.train", str(rows), "--data.val", str(rows)),
        *("--data.context", str(folder / "context.txt"), "--data.batch_size", "2", "--trainer.max_steps", "3"),
        *("--model.rollout.init_args.sampling.max_new_tokens", "4", "--model.eval_sampling.max_new_tokens", "4"),
        *("--trainer.val_check_interval", "1", "--trainer.default_root_dir", str(folder / "runs")),
    )
    made = [folder / "runs" / f"version_{number}" for number in (0, 1)]
    evaluate = ("evaluate", "--model", str(made[1] / "student"), "--tasks", "dapo_math", "--data.dapo_math", str(sums))
    with pytest.MonkeyPatch.context() as patch:
        for words in (
            shared,
            (*shared, "--model.loss", "ForwardKL", "--config", str(folder / "eval.yaml")),
            (*evaluate, "--limit", "2", "--max_new_tokens", "4", "--out", str(made[1] / "results" / "after")),
        ):
            patch.setattr(sys, "argv", ["opcd"])
            assert main(list(words)) == 0
    return made


@pytest.fixture(scope="module")
def page_file(runs) -> Path:
    file = runs[0].parent / "both.html"
    assert main(["report", *map(str, runs), "--out", str(file)]) == 0
    return file


def test_the_page_needs_nothing_else_and_has_its_curves(runs, page_file):
    page = Page(page_file)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    changed = set()
    for run in runs:
        rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
        changed |= {name for name in rows[0] if len({float(row[name]) for row in rows if row[name]}) > 1}
    drawn = {name for name in changed if not name.startswith("seconds/")} | {"seconds/step"}
    drawn -= {name for name in changed if name.endswith(("_low", "_high"))}  # bounds are in the tables
    assert set(page.plots) - {"samples/right"} == drawn - {"step", "epoch"} > {"train/divergence", "val/divergence"}
    assert all(size > 500 for size in page.plots.values())
    assert page_file.read_text().count("<html") == 1


def test_its_numbers_are_those_of_the_runs(runs, page_file):
    page = Page(page_file)
    for run in runs:
        with (run / "metrics.csv").open() as stream:
            steps = [row for row in csv.DictReader(stream) if row["train/divergence"]]
        last = float(steps[-1]["train/divergence"])
        assert page.column("numbers", str(run))["train/divergence"] == f"{last:.4g}"
        assert page.column("results", "divergence at the end, nats a token")[str(run)] == f"{last:.4g}"
        assert page.column("results", "steps")[str(run)] == "3"
        seconds = [float(row["seconds/step"]) for row in steps]
        assert page.column("results", "seconds a step")[str(run)] == f"{sum(seconds) / len(seconds):.4g}"
        memory = float(steps[-1]["memory/peak_mib"]) / 1024
        assert page.column("results", "peak memory, GiB")[str(run)] == f"{memory:.4g}"
    assert page.column("results", "right before")[str(runs[0])].endswith(" of 6")


def test_a_metric_with_an_interval_has_a_band():
    found = []

    def draw(axes):
        line = [(0, 0.0), (5, 0.5), (10, 0.6)]
        curves(axes, {"run": [line]}, {"run": ([(5, 0.4), (10, 0.5)], [(5, 0.7), (10, float("nan"))])})
        (band,) = axes.collections
        found.extend(band.get_paths()[0].vertices.tolist())

    drawn(draw, "context/recovery", "step", "share")
    assert {(x, y) for x, y in found} == {(5.0, 0.4), (5.0, 0.7)}


def test_config_differences_are_named(runs, page_file):
    differences = Page(page_file).tables["differences"]
    assert [row[0] for row in differences[1:]] == ["trainer.callbacks", "model.loss.class_path"]
    assert differences[0][1:] == [str(run) for run in runs]
    assert differences[2][1:] == ['"opcd.losses.ReverseKL"', '"opcd.losses.ForwardKL"']


def test_answers_evaluations_environment_and_command(runs, page_file):
    page = Page(page_file)
    assert TRICKY["query"] in page.text and "<b>1</b>" not in page_file.read_text()
    samples = [json.loads(line) for line in (runs[1] / "samples.jsonl").read_text().splitlines()]
    assert samples[-1]["answer"].split()[0] in page.text and f"{runs[1]}, after" in page.text
    _, *rows = page.tables["evaluations"]
    assert {(row[0], row[1]) for row in rows} == {(str(runs[1]), "eval, step 3"), (str(runs[1]), "results/after")}
    summary = json.loads((runs[1] / "results" / "after" / "results.json").read_text())
    for name, metric in summary["tasks"]["dapo_math"]["metrics"].items():
        (row,) = [row for row in rows if row[1] == "results/after" and row[4] == name]
        assert row[2:4] == ["dapo_math", "2"] and row[5] == f"{metric['value']:.3f}"
    (inside,) = [row for row in rows if row[1] == "eval, step 3" and row[4] == "accuracy"]
    answers = [json.loads(line) for line in (runs[1] / "eval" / "step=3-dapo_math.jsonl").read_text().splitlines()]
    assert inside[5] == f"{sum(row['accuracy'] for row in answers) / 2:.3f}"
    environment = json.loads((runs[1] / "environment.json").read_text())
    assert environment["command"] in page.text and environment["command"].startswith("opcd fit --model.student.name")
    assert page.column("environment", str(runs[1]))["torch"] == environment["versions"]["torch"]
    assert "core" in page.column("environment", str(runs[0]))["processor"]


def test_in_a_browser(page_file, runs):
    with opened(page_file) as page:
        check_plots(page, len(Page(page_file).plots), str(runs[1]))
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert TRICKY["query"] in page.locator("summary").first.inner_text()


def test_one_run_without_matplotlib_has_a_page_and_a_message(opcd, runs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, text = opcd("report", runs[0], "--out", tmp_path / "one.html")
    assert code == 0 and text.count(install_hint("plots")) == 1
    page = Page(tmp_path / "one.html")
    assert not page.plots and "differences" not in page.tables and len(page.tables["results"]) == 2


def test_a_run_that_wrote_nothing_yet_has_a_page(opcd, runs, tmp_path):
    folder = tmp_path / "version_9"
    folder.mkdir()
    shutil.copy(runs[0] / "config.yaml", folder)
    assert opcd("report", folder, "--out", tmp_path / "page.html")[0] == 0
    assert Run.read(folder).steps == 0 and Page(tmp_path / "page.html").tables["results"][1][:3] == [
        *(str(folder), "0", "-"),
    ]


@pytest.mark.case("C19")
def test_no_page_is_overwritten(opcd, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert opcd("report", runs[0])[0] == 0
    before = Path("report.html").read_text()
    code, text = opcd("report", runs[1])
    assert code == 2 and f"--out: {tmp_path}/report.html exists already" in text
    assert Path("report.html").read_text() == before


def test_user_mistakes(opcd, runs, tmp_path):
    code, text = opcd("report", tmp_path)
    assert code == 2 and f"{tmp_path} holds no run of `opcd fit`" in text
    code, text = opcd("report", runs[0], runs[0].parent / "." / runs[0].name)
    assert code == 2 and "is named twice" in text
    code, text = opcd("report", runs[0], "--out", tmp_path / "nowhere" / "page.html")
    assert code == 2 and "--out: cannot write" in text
