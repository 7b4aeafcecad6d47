"""Rounds: experience, a real distillation of a tiny model, and experience of the distilled student."""

import json

import pytest
import yaml

from opcd.cli.fit import fit_parser
from opcd.cli.pages.show import make_page
from opcd.experience import MathProblems
from opcd.experience.experience_config import Experience, Fit
from opcd.experience.rounds import fit_settings
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError
from opcd.sweep.arm_checks import ConfigChecker
from tests.helpers.rows import ROWS, read_rows, write_rows


@pytest.fixture
def fit(tmp_path, tiny) -> dict:
    """A distillation of one step."""
    return {
        "data.train": str(write_rows(tmp_path / "fit.jsonl", ROWS)),
        "data.batch_size": 2,
        "trainer.max_steps": 1,
        "trainer.enable_checkpointing": False,
        "model.eval_sampling.max_new_tokens": 4,
        "model.rollout": {"class_path": "StudentRollout", "init_args": {"sampling": {"max_new_tokens": 4}}},
    }


def settings(fit: dict, tiny: str, teacher: str = "fixed", rounds: int = 2) -> dict:
    """What the second round sets, its student being in the folder `tiny` too."""
    first = Experience(
        problems=MathProblems("a.jsonl", "b.jsonl"),
        student=ModelConfig(),
        rounds=rounds,
        fit=Fit(set=fit, teacher=teacher),
    )
    context = fit["data.train"].replace("fit.jsonl", "context.txt")
    with open(context, "w") as stream:  # noqa: PTH123
        stream.write("A lesson.")
    return fit_settings(first, first.with_student(tiny), context, ConfigChecker(fit_parser(), first.fit))


def test_the_teacher_of_the_second_round(fit, tiny):
    found = settings(fit, tiny)
    assert found["model.student.name"] == tiny
    assert found["model.teacher.init_args.model.name"] == "smollm2-135m"  # that of the first round
    assert "model.teacher.init_args.model.name" not in settings(fit, tiny, "renewed")  # the student's own weights
    named = fit | {"model.teacher": {"class_path": "FrozenTeacher", "init_args": {"model": {"name": "smollm2-135m"}}}}
    assert "model.teacher.init_args.model.name" not in settings(named, tiny)
    with pytest.raises(UserError, match=r"fit.teacher: renewed takes each round's student"):
        settings(named, tiny, "renewed")
    own = fit | {"model.teacher": {"class_path": "SelfTeacher"}}
    with pytest.raises(UserError, match=r"fit.teacher: fixed needs a FrozenTeacher"):
        settings(own, tiny)
    assert "model.teacher.init_args.model.name" not in settings(own, tiny, rounds=1)
    several = {"class_path": "RoutedTeachers", "init_args": {"teachers": {"a": own["model.teacher"]}, "default": "a"}}
    with pytest.raises(UserError, match=r"model.teacher of fit: a round has one context and one teacher"):
        settings(fit | {"model.teacher": several}, tiny)


@pytest.mark.slow
def test_two_rounds(scripted, fit, tiny, tmp_path, capsys):
    config = tmp_path / "rounds.yaml"
    config.write_text(yaml.safe_dump({"rounds": 2, "student": {"name": tiny}, "fit": {"set": fit, "context": "each"}}))
    words = ["--config", str(config), "--select.every=4"]
    out = scripted(*words)
    rounds = read_rows(out / "rounds.jsonl")
    assert [(r["round"], r["student_before"], r["student_after"]) for r in rounds] == [(1, 0, 0), (2, 0, 0)]
    assert rounds[0]["selected"] == 1.0 and rounds[0]["divergence"] > 0
    jobs = [json.loads((out / f"round-{n}" / "fit" / "job.json").read_text())["config"] for n in (1, 2)]
    assert jobs[1]["model"]["student"]["name"] == str(out / "round-1" / "fit" / "runs" / "version_0" / "student")
    assert [job["model"]["teacher"]["init_args"]["model"]["name"] for job in jobs] == [tiny, tiny]
    assert [job["data"]["context"] for job in jobs] == [str(out / f"round-{n}" / "contexts.jsonl") for n in (1, 2)]
    items = [[r["item"] for r in read_rows(out / f"round-{n}" / "attempts.jsonl")] for n in (1, 2)]
    assert items[0] != items[1]  # another draw
    assert "round 2" in capsys.readouterr().out and "<h2>Rounds</h2>" in make_page(out)
    calls = (tmp_path / "out-calls.txt").read_text()
    marks = {file: file.stat().st_mtime_ns for file in out.glob("round-*/fit/finished.json")}
    scripted(*words)  # nothing is computed twice
    assert (tmp_path / "out-calls.txt").read_text() == calls
    assert {file: file.stat().st_mtime_ns for file in marks} == marks and len(marks) == 2
