"""benchmarks/run.py: shipped configs, wrong input, a whole comparison of a tiny model, its page in a browser."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from opcd.runtime.errors import UserError
from opcd.sweep.sweep_plan import parse_yaml
from tests.helpers.browser import check_plots, opened
from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
CONFIGS = sorted((BENCHMARKS / "configs").glob("*.yaml"))
IFEVAL = BENCHMARKS / "data" / "ifeval_rows.jsonl"


def game(start: int) -> dict:
    """FrozenLake's seeds from `start` on, as what a comparison measures."""
    seeds = {"environment": {"class_path": "opcd.games.FrozenLake"}, "start": start, "count": 10}
    games = {"class_path": "opcd.games.GameSeeds", "init_args": seeds}
    return {"name": "lake", "metric": "success", "title": "lake", "games": games}


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """As `python benchmarks/run.py` sees it."""
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.fixture
def config(tmp_path, tiny, rows, context):
    def write(**changed: object) -> Path:
        content = {
            "task": {"name": "samples", "metric": "accuracy", "title": "facts"},
            "forgetting": {
                "name": "ifeval",
                "metric": "prompt_level_strict_acc",
                "title": "rules & <more>",
                "data": str(IFEVAL),
                "options": {"greedy": True, "max_new_tokens": 8, "limit": 2},
            },
            "arms": ["base", "in-context", "OPCD, top-256 drop"],
            "seeds": [0, 1],
            "sampling": {"max_new_tokens": 4},
            "base": {
                "config": [str(ROOT / "configs" / "quickstart.yaml")],
                "set": {
                    "model.student.name": tiny,
                    "data.train": str(rows),
                    "data.val": str(rows),
                    "data.context": str(context),
                    "trainer.max_steps": 2,
                    "trainer.enable_checkpointing": False,
                    "model.eval_sampling.max_new_tokens": 4,
                },
            },
        }
        file = tmp_path / "tiny.yaml"
        file.write_text(yaml.safe_dump(content | changed))
        return file

    return write


def command(file: Path, out: Path, *more: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "benchmarks/run.py", str(file), "--out", str(out), *map(str, more)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_shipped_configs_are_whole(file, monkeypatch):
    """Parsed, with arms, metrics and keys that exist; rows and models of the hub are not asked for."""
    from comparison.arms import SAMPLES, Benchmark

    from opcd.cli.evaluate import parse
    from opcd.cli.fit import fit_parser
    from opcd.evaluation.game_tasks import GameRows
    from opcd.games import GameSeeds
    from opcd.sweep.arm_checks import ConfigChecker
    from opcd.sweep.sweep_plan import overrides

    monkeypatch.chdir(ROOT)
    benchmark = parse_yaml(file, Benchmark, "config")
    benchmark.apply(None, None, None, None, {"data.context": "lessons.txt"})
    ConfigChecker(fit_parser(), benchmark.base)
    for measure in benchmark.measures.values():
        if measure.name != SAMPLES:
            data = {f"data.{measure.name}": measure.games} if measure.games else {}
            words = overrides(measure.options | data)
            _, evaluation, _ = parse(["--model.name", "x", "--tasks", measure.name, *words])
            if isinstance(evaluation.data.get(measure.name), GameSeeds):
                assert measure.metric in GameRows("", "", []).metrics
            else:
                assert measure.metric in (ROOT / "opcd" / "tasks" / f"{measure.name}.yaml").read_text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ["base", "OPCD"]}, "no arm 'OPCD'"),
        ({"arms": ["base"]}, "no arm is trained"),
        ({"seeds": [0, 0]}, "seeds must be one or more, each once"),
        ({"seeds": []}, "seeds must be one or more"),
        ({"task": game(0) | {"data": "rows.jsonl"}}, "task.data has no effect beside task.games"),
        ({"forgetting": {"name": "samples", "metric": "accuracy", "title": "x"}}, "must be a task of"),
    ],
)
def test_wrong_configs(config, changed, message):
    from comparison.arms import Benchmark

    benchmark = parse_yaml(config(**changed), Benchmark, "config")
    with pytest.raises(UserError, match=message):
        benchmark.apply(None, None, None, None, {})


@pytest.mark.filterwarnings("ignore:tail=.drop. is not a divergence")
def test_a_game_is_trained_and_measured_on_seeds_of_its_own(config, tmp_path, tiny, context):
    from comparison.arms import Benchmark, Plan

    from opcd.cli.evaluate import parse
    from opcd.cli.fit import fit_parser
    from opcd.games import GameSeeds
    from opcd.sweep.arm_checks import ConfigChecker

    folder = tmp_path / "roomy"
    shutil.copytree(tiny, folder)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(
        text.replace('"max_position_embeddings": 512', '"max_position_embeddings": 8192')
    )
    settings = {"model.student.name": str(folder), "data.train": game(0)["games"], "data.context": str(context)}
    settings |= {"data.val": None}
    base = {"config": [str(ROOT / "configs" / "quickstart.yaml")], "set": settings}
    forgetting = {"name": "ifeval", "metric": "prompt_level_strict_acc", "title": "x", "data": str(IFEVAL)}
    forgetting["options"] = {"max_new_tokens": 8}

    def plan(start: int) -> Plan:
        task = game(start) | {"options": {"max_new_tokens": 8}}
        file = config(task=task, base=base, forgetting=forgetting, around="opcd.games.GameRollout")
        benchmark = parse_yaml(file, Benchmark, "config")
        benchmark.apply(None, None, None, None, {})
        return Plan(benchmark, ConfigChecker(fit_parser(), benchmark.base), tmp_path / "out")

    made = plan(10)
    (fit, *_), evaluations = made.fits["OPCD, top-256 drop"], made.evaluations["OPCD, top-256 drop"]
    rollout = fit.config["model"]["rollout"]
    assert rollout["class_path"] == "opcd.games.GameRollout"
    assert rollout["init_args"]["rollout"]["class_path"] == "opcd.modules.StudentRollout"
    _, evaluation, _ = parse(evaluations[0]["task"].words[1:])
    assert isinstance(evaluation.data["lake"], GameSeeds) and evaluation.data["lake"].start == 10
    with pytest.raises(
        UserError, match=r"task: its data and data\.train share seed 9 of FrozenLake; give each its own"
    ):
        plan(9)


@pytest.mark.filterwarnings("ignore:tail=.drop. is not a divergence")
def test_one_task_may_be_both_measures_with_other_rows(config, tmp_path):
    """Of the results of the one, none lands on those of the other."""
    from comparison.arms import Benchmark, Plan

    from opcd.cli.fit import fit_parser
    from opcd.sweep.arm_checks import ConfigChecker

    rows = tmp_path / "other.jsonl"
    rows.write_text(IFEVAL.read_text())
    task = {"name": "ifeval", "metric": "prompt_level_strict_acc", "title": "rules", "data": str(rows)}
    benchmark = parse_yaml(config(task=task | {"options": {"max_new_tokens": 8}}), Benchmark, "config")
    benchmark.apply(None, None, None, None, {})
    plan = Plan(benchmark, ConfigChecker(fit_parser(), benchmark.base), tmp_path / "out")
    jobs = plan.evaluations["base"][0]
    assert {key: any(str(rows) in word for word in job.words) for key, job in jobs.items()} == {
        "task": True,
        "forgetting": False,
    }
    assert len({job.name for job in plan.jobs()}) == len(plan.jobs())


@pytest.mark.filterwarnings("ignore:tail=.drop. is not a divergence")
def test_a_task_of_a_folder_may_be_measured(config, tmp_path, monkeypatch):
    from comparison.arms import Benchmark, Plan

    from opcd.cli.evaluate import parse
    from opcd.cli.fit import fit_parser
    from opcd.sweep.arm_checks import ConfigChecker

    def plan(metric: str) -> Plan:
        options = {"include_path": str(ROOT / "examples" / "evaluation_tasks")}
        task = {"name": "harbour_choice", "metric": metric, "title": "harbour", "options": options}
        benchmark = parse_yaml(config(task=task), Benchmark, "config")
        benchmark.apply(None, None, None, None, {})
        return Plan(benchmark, ConfigChecker(fit_parser(), benchmark.base), tmp_path / "out")

    _, evaluation, _ = parse(plan("acc").evaluations["base"][0]["task"].words[1:])
    assert evaluation.tasks == ["harbour_choice"] and evaluation.include_path
    with pytest.raises(UserError, match="the answers to harbour_choice have no score 'accc'; did you mean acc"):
        plan("accc")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data.train", "nowhere.jsonl"), "data.train: no file"),
        (("--forgetting_data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--model.los", "JSD"), "'model.los' is no config key; did you mean model.loss?"),
        (("--steps", "3"), "neither an option nor a dotted config key"),
    ],
)
def test_user_mistakes_end_with_2_and_leave_nothing(config, tmp_path, words, message):
    done = command(config(), tmp_path / "out", *words)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_comparison_and_its_page(config, tmp_path):
    out = tmp_path / "out"
    done = command(config(), out, "--jobs", 2)
    assert done.returncode == 0, done.stdout + done.stderr
    table = list(csv.DictReader((out / "table.csv").read_text().splitlines()))
    assert [(row["arm"], row["seeds"]) for row in table] == [
        ("base", "1"),
        ("in-context", "1"),
        ("OPCD, top-256 drop", "2"),
    ]
    assert "| OPCD, top-256 drop | 2 |" in done.stdout and (out / "table.md").read_text() in done.stdout
    full = json.loads((out / "table.json").read_text())
    files = [out / "OPCD__top-256_drop" / f"seed={seed}" / "forgetting" / "ifeval.jsonl" for seed in (0, 1)]
    by_hand = [json.loads(line)["prompt_level_strict_acc"] for file in files for line in file.read_text().splitlines()]
    assert full["arms"]["OPCD, top-256 drop"]["scores"]["forgetting"]["mean"]["value"] == sum(by_hand) / len(by_hand)
    again = command(config(), out, "--jobs", 2)
    assert again.returncode == 0 and again.stdout.count("finished before") == 6 and ": running" not in again.stdout
    check_page(out / "report.html")


def check_page(page_file: Path) -> None:
    """Every plot is drawn, and a title's characters are text."""
    with opened(page_file) as page:
        check_plots(page, 4, "OPCD, top-256 drop")
        assert "rules & <more>" in page.locator("#results thead").inner_text()
