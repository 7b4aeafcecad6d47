"""What a sweep says of its runs: figures, summary, plots."""

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from opcd.results.plots import bars, curves, drawn
from opcd.results.run_files import clock, figures, right_over_steps
from opcd.sweep.arm_checkpoints import keep_the_best
from opcd.sweep.job_engine import Task
from opcd.sweep.jobs import Job, JobFolder
from opcd.sweep.summary import ArmResult, markdown_table, mean_and_spread, write_summary
from opcd.sweep.sweep_plan import make_arm


@pytest.fixture
def task(tmp_path):
    def make(name: str, status: str, losses: list[float], answers: list[str] = ()) -> Task:
        job = Job(f"arms/{name}", ["fit"], {}, "done")
        folder = JobFolder(tmp_path, job)
        folder.run.mkdir(parents=True)
        rows = [f"0,{step},{loss},{step + 1}.0" for step, loss in enumerate(losses)]
        text = "\n".join(["epoch,step,train/divergence,seconds/step", *rows, "0,9,,"])
        (folder.run / "metrics.csv").write_text(text + "\n")
        with (folder.run / "samples.jsonl").open("w") as stream:
            for step, answer in enumerate(answers):
                for context in (False, True):
                    row = {"step": step, "query": "?", "reference": "5", "context": context, "answer": answer}
                    stream.write(json.dumps(row) + "\n")
        return Task(job, folder, status=status, seconds=61.2)

    return make


def test_figures_of_a_run(task):
    run = task("a", "finished", [3.0, 1.0], ["50", "it is 5."]).folder.run
    (run / "student").mkdir()
    (run / "student" / "adapter_model.safetensors").write_bytes(b"12345")
    assert figures(run) == {
        "train/divergence": 1.0,  # the last
        "seconds/step": 1.5,  # the mean
        "samples/right_before": 0.0,
        "samples/right": 1.0,
        "student/bytes": 5.0,
    }
    assert right_over_steps(run) == [(0, 0.0), (1, 1.0)]
    assert figures(Path("nowhere")) == {}


@pytest.mark.case("A8")
def test_cells_that_a_spreadsheet_would_run(task, tmp_path):
    runs = [
        "=1+1",
        "+1-1",
        "-2+3",
        "@SUM(A1)",
        "\t=1",
        " =1",
        "\uff1d1",
        "=cmd|' /C calc'!A0",
        "\r=1",
        "-1e-5",
        "+5",
        "-inf",
        "-",
    ]
    arms = [make_arm({"=key": value, "seed_everything": seed}, name=f"a{seed}") for seed, value in enumerate(runs)]
    write_summary(tmp_path, [ArmResult(arm, task(arm.name, "finished", [1.0]), {"@loss": -0.5}) for arm in arms])
    header, *cells = csv.reader(io.StringIO((tmp_path / "summary.csv").read_text(), newline=""))
    assert header == ["arm", "status", "seconds", "'=key", "seed_everything", "'@loss"]
    assert [row[3] for row in cells] == [f"'{value}" for value in runs[:8]] + [r"\r=1", *runs[9:]]
    assert {row[5] for row in cells} == {"-0.5"}


@pytest.mark.case("A8")
def test_markup_in_a_summary_is_text():
    text = markdown_table(["<b>", "a|b"], [["x\ny", "`c` [l](u) <img src=x> *d* \x1b[2J a_b _c_"]])
    assert text.splitlines() == [
        r"| &lt;b&gt; | a\|b |",
        "| --- | --- |",
        r"| x y | \`c\` \[l\](u) &lt;img src=x&gt; \*d\* \\x1b\[2J a_b \_c\_ |",
    ]


def test_the_summary(task, tmp_path):
    arms = [make_arm({"model.loss": loss, "seed_everything": seed}) for loss in ("JSD", "a|b") for seed in (0, 1)]
    statuses = ["finished", "finished", "finished", "failed"]
    tasks = [task(arm.name, status, [2.0, 1.0 + n]) for n, (arm, status) in enumerate(zip(arms, statuses, strict=True))]
    write_summary(tmp_path, [ArmResult.of(arm, task) for arm, task in zip(arms, tasks, strict=True)])
    rows = list(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert [(row["status"], row["model.loss"], row["seed_everything"]) for row in rows] == [
        *(("finished", "JSD", "0"), ("finished", "JSD", "1"), ("finished", "a|b", "0"), ("failed", "a|b", "1"))
    ]
    assert [row["train/divergence"] for row in rows] == ["1.0", "2.0", "3.0", ""]
    text = (tmp_path / "summary.md").read_text()
    assert "| loss=JSD,seed_everything=0 | finished | 1:01 | 1 | 1.5 |" in text
    assert "| loss=JSD | 2 | 1.5 ± 0.7071 | 1.5 ± 0 |" in text
    assert "| loss=a_b | 2 | 3 | 1.5 |" in text  # of the one that finished


def test_an_evaluations_first_metric_stands_in_the_summary_with_its_interval(task, tmp_path):
    names, values = ["accuracy", "accuracy_low", "accuracy_high", "answered"], [0.25, 0.125, 0.5, 0.75]
    evaluated, plain = task("a", "finished", [1.0]), task("b", "finished", [1.0])
    header = ",".join(["epoch,step", *(f"eval/dapo_math/{name}" for name in names)])
    (evaluated.folder.run / "metrics.csv").write_text(f"{header}\n0,9,{','.join(map(str, values))}\n")
    arms = [make_arm({"model.loss": loss}) for loss in ("JSD", "ReverseKL")]
    write_summary(tmp_path, [ArmResult.of(arm, task) for arm, task in zip(arms, (evaluated, plain), strict=True)])
    head, _, *rows = (tmp_path / "summary.md").read_text().splitlines()
    assert head == "| arm | status | time | train/divergence | seconds/step | eval/dapo_math/accuracy |"
    assert rows[0] == "| loss=JSD | finished | 1:01 | - | - | 0.25 (0.125 to 0.5) |"
    assert rows[1] == "| loss=ReverseKL | finished | 1:01 | 1 | 1 | - |"


def test_mean_and_spread():
    assert [mean_and_spread(values) for values in ([], [1.0], [1.0, 3.0])] == ["-", "1", "2 ± 1.414"]


def test_plots_are_svg_with_their_text_and_ids_of_their_own():
    pytest.importorskip("matplotlib")
    lines = {"JSD & <co>": [[(0, 1.0), (1, 2.0)], [(0, 2.0), (1, 3.0)]], "none": [[]]}
    first = drawn(lambda axes: curves(axes, lines), "title", "step", "nats", "first")
    second = drawn(lambda axes: bars(axes, {"a": [1.0, 2.0]}), "title", "nats", "", "second")
    ids = [{e.get("id") for e in ElementTree.fromstring(text).iter() if e.get("id")} for text in (first, second)]
    assert ids[0] and ids[1] and not ids[0] & ids[1]
    text = " ".join(ElementTree.fromstring(first).itertext())
    assert "JSD & <co>" in text and "none" not in text
    for used in ElementTree.fromstring(first).iter():
        link = used.get("{http://www.w3.org/1999/xlink}href")
        assert link is None or link.removeprefix("#") in ids[0]


def test_clock():
    assert [clock(seconds) for seconds in (0, 61, 3661)] == ["0:00", "1:01", "1:01:01"]


def saved(task: Task) -> list[str]:
    """The files of an arm's checkpoints."""
    return sorted(file.name for file in (task.folder.run / "checkpoints").glob("*"))


@pytest.mark.case("C20")
def test_only_the_best_arm_keeps_its_checkpoints(task):
    arms = [make_arm({"model.temperature": value}) for value in (1.0, 0.7, 0.5)]
    statuses, losses = ["finished", "finished", "failed"], [0.5, 0.3, 0.1]
    tasks = [task(a.name, s, [2.0, loss]) for a, s, loss in zip(arms, statuses, losses, strict=True)]
    for one in tasks:
        folder = one.folder.run / "checkpoints"
        folder.mkdir()
        for name in ("step=9.ckpt", "step=9.ckpt.json", "mine.txt"):
            (folder / name).touch()
    results = [ArmResult.of(arm, one) for arm, one in zip(arms, tasks, strict=True)]
    keep_the_best(results)
    assert [len(saved(one)) for one in tasks] == [1, 3, 3]  # the second is the best; one that failed is left alone
    assert saved(tasks[0]) == ["mine.txt"]


@pytest.mark.case("C20")
@pytest.mark.parametrize(
    "asked",
    [
        {"trainer": {"enable_checkpointing": True}},
        {"trainer": {"callbacks": [{"class_path": "opcd.callbacks.SaveCheckpoints", "init_args": {"keep": 1}}]}},
    ],
)
def test_arms_that_ask_for_checkpoints_keep_them_and_so_do_those_of_before(task, asked):
    arms = [make_arm({"model.temperature": value}) for value in (1.0, 0.7, 0.5)]
    tasks = [task(arm.name, "finished", [2.0, loss]) for arm, loss in zip(arms, [0.5, 0.4, 0.3], strict=True)]
    tasks[0].job.config.update(asked)
    tasks[1].before = True
    for one in tasks:
        (one.folder.run / "checkpoints").mkdir()
        (one.folder.run / "checkpoints" / "step=9.ckpt").touch()
    keep_the_best([ArmResult.of(arm, one) for arm, one in zip(arms, tasks, strict=True)])
    assert [saved(one) for one in tasks] == [["step=9.ckpt"]] * 3
