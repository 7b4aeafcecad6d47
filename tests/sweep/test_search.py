"""Search with Optuna, on a function in the place of training."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from opcd.runtime.errors import UserError
from opcd.sweep.search import ArmSearch, best
from opcd.sweep.summary import ArmResult
from opcd.sweep.sweep_plan import Search, SweepFile

pytest.importorskip("optuna")
AXES = {"model.x": {"low": -2.0, "high": 2.0}, "model.k": {"low": 1, "high": 4}, "model.loss": [{"a": 1}, "JSD"]}


def search(folder: Path, seen: list, trials: int, at_once: int = 1, axes: dict = AXES, fail: bool = False) -> None:
    def work(arms):
        seen.extend((arm.name, arm.settings) for arm in arms)
        status = "failed" if fail else "finished"
        numbers = [{"loss": arm.settings["model.x"] ** 2 + arm.settings["model.k"]} for arm in arms]
        return [ArmResult(arm, SimpleNamespace(status=status), n) for arm, n in zip(arms, numbers, strict=True)]

    ArmSearch(SweepFile(axes=axes, search=Search("loss", trials=trials)), folder / "trials.json").run(work, at_once)


def test_a_resumed_search_asks_what_it_has_asked_and_then_goes_on(tmp_path):
    first, resumed = [], []
    search(tmp_path, first, 5)
    search(tmp_path, resumed, 12, at_once=4)
    assert resumed[:5] == first and len(resumed) == 12
    names = [name for name, _ in resumed]
    assert names == [f"trial-{number:04d}" for number in range(12)]
    for _, settings in resumed:
        assert -2 <= settings["model.x"] <= 2 and settings["model.k"] in (1, 2, 3, 4)
        assert settings["model.loss"] in ({"a": 1}, "JSD")
    with pytest.raises(UserError, match=r"is of another search \(axes.model.k.high changed\)"):
        search(tmp_path, [], 5, axes=AXES | {"model.k": {"low": 1, "high": 9}})


def test_failed_trials_are_counted_and_do_not_stop_the_search(tmp_path):
    seen = []
    search(tmp_path, seen, 3, fail=True)
    assert len(seen) == 3


def test_the_ends_of_the_ranges_are_checked_before(tmp_path):
    corners = ArmSearch(SweepFile(axes=AXES, search=Search("loss")), tmp_path / "trials.json").corners()
    assert [arm.settings for arm in corners] == [
        {"model.x": -2.0, "model.k": 1, "model.loss": {"a": 1}},
        {"model.x": 2.0, "model.k": 4, "model.loss": "JSD"},
    ]


@pytest.mark.parametrize(
    ("axis", "message"),
    [
        (5, "must be a list of values or a range"),
        ([], "must be a list of values or a range"),
        ({"low": 1}, "must be a list of values or a range"),
        ({"low": 1, "high": 2, "steps": 1}, "must be a list of values or a range"),
        ({"low": "1e-5", "high": 1}, "must be numbers.*YAML wants"),
        ({"low": 2.0, "high": 1.0}, "axes.a: "),
        ({"low": 0.0, "high": 1.0, "log": True}, "axes.a: "),
    ],
)
def test_wrong_ranges_are_refused(tmp_path, axis, message):
    with pytest.raises(UserError, match=message):
        ArmSearch(SweepFile(axes={"a": axis}, search=Search("m")), tmp_path / "trials.json")


def test_a_metric_that_no_arm_has_and_the_best_arm(tmp_path):
    chosen = ArmSearch(SweepFile(axes=AXES, search=Search("los")), tmp_path / "trials.json")
    results = [
        ArmResult(SimpleNamespace(name=str(n), settings={"a": n}), SimpleNamespace(status="finished"), {"loss": n})
        for n in (3.0, 1.0, 2.0)
    ]
    with pytest.raises(UserError, match="has no 'los'; did you mean loss"):
        chosen.value(results[0])
    assert best(results, Search("loss")).startswith("best: 1.0 ")
    assert best(results, Search("loss", "maximize")).startswith("best: 3.0 ")
    assert best([], Search("loss")) == "no trial has finished with a finite loss"
