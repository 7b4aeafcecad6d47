"""A sweep that chooses its arms: Optuna asks, the engine answers."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opcd.results.run_files import is_finite
from opcd.runtime.did_you_mean import or_all
from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.files.user_files import read_json
from opcd.sweep.summary import ArmResult
from opcd.sweep.sweep_plan import Arm, Search, SweepFile, label

RANGE = {"low", "high", "log", "step"}


class ArmSearch:
    """Optuna's study, kept in memory: a resumed search asks what it has asked before, and finds the finished arms.

    Args:
        sweep: its axes are lists of values or ranges {low, high, log, step}; integers where low, high and step are.
        file: where the trials asked for are written down.

    Raises:
        UserError: Optuna is not installed, a range is wrong, or the file is of another search.
    """

    def __init__(self, sweep: SweepFile, file: Path) -> None:
        assert sweep.search is not None
        require("search", "optuna", "search")
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna, self.search = optuna, sweep.search
        self.ranges = {key: self._distribution(key, value) for key, value in sweep.axes.items()}
        # A list's values may be dictionaries, which Optuna does not take: it chooses their place.
        self.lists = {key: value for key, value in sweep.axes.items() if isinstance(value, list)}
        sampler = optuna.samplers.TPESampler(seed=sweep.search.seed)
        self.study = optuna.create_study(direction=sweep.search.direction, sampler=sampler)
        self._file, self._asked = file, self._resume(sweep, file)

    def corners(self) -> list[Arm]:
        """Arms at the ends of each range, for checks before anything is run."""
        low, high = ({key: self._end(key, end) for key in self.ranges} for end in (0, -1))
        return [Arm("the low end of all ranges", low), Arm("the high end of all ranges", high)]

    def run(self, work: Callable[[Sequence[Arm]], list[ArmResult]], at_once: int) -> None:
        """Ask for arms in rounds of `at_once`, and tell what came of them.

        Raises:
            UserError: a finished arm has no such metric.
        """
        asked = 0
        while asked < self.search.trials:
            trials = [self._ask(asked + more) for more in range(min(at_once, self.search.trials - asked))]
            arms = [Arm(f"trial-{trial.number:04d}", self._settings(trial.params)) for trial in trials]
            asked += len(trials)
            for trial, result in zip(trials, work(arms), strict=True):
                value = self.value(result)
                failed = value is None or not math.isfinite(value)
                state = self._optuna.trial.TrialState.FAIL if failed else None
                self.study.tell(trial, None if failed else value, state=state)

    def value(self, result: ArmResult) -> float | None:
        """The metric of an arm, or None where it failed."""
        if result.task.status != "finished":
            return None
        if self.search.metric not in result.numbers:
            hint = or_all(self.search.metric, result.numbers)
            raise UserError(f"search.metric: {result.arm.name} has no {self.search.metric!r}{hint}")
        return result.numbers[self.search.metric]

    def _resume(self, sweep: SweepFile, file: Path) -> dict[str, Any]:
        assert sweep.search is not None
        of = {"axes": sweep.axes, **{key: value for key, value in vars(sweep.search).items() if key != "trials"}}
        if not file.exists():
            return {"search": of, "asked": []}
        known: Any = read_json(file, "--out")
        asked = known.get("asked") if isinstance(known, dict) else None
        if not isinstance(asked, list) or not all(isinstance(one, dict) for one in asked) or "search" not in known:
            raise UserError(f"{file} is no list of a search's trials; choose another --out")
        if changed := changed_keys(known["search"], json.loads(json.dumps(of))):
            raise UserError(f"{file} is of another search ({', '.join(changed[:3])} changed); choose another --out")
        return dict(known)

    def _ask(self, number: int) -> Any:
        """The trial of this number: as a former run asked for it, or a new one, written down before it runs."""
        asked = self._asked["asked"]
        if number < len(asked):
            self.study.enqueue_trial(asked[number])
            return self.study.ask(self.ranges)
        trial = self.study.ask(self.ranges)
        asked.append(trial.params)
        write_atomic(self._file, json.dumps(self._asked, indent=1))
        return trial

    def _settings(self, params: dict[str, Any]) -> dict[str, Any]:
        return {key: self.lists[key][int(value)] if key in self.lists else value for key, value in params.items()}

    def _end(self, key: str, end: int) -> Any:
        if key in self.lists:
            return self.lists[key][end]
        return (self.ranges[key].low, self.ranges[key].high)[end]

    def _distribution(self, key: str, axis: Any) -> Any:
        """Optuna's distribution of an axis."""
        distributions = self._optuna.distributions
        if isinstance(axis, list) and axis:
            return distributions.CategoricalDistribution([str(place) for place in range(len(axis))])
        where, shown = f"axes.{key}", json.dumps(axis)
        if not isinstance(axis, dict) or not {"low", "high"} <= axis.keys() <= RANGE:
            raise UserError(f"{where} must be a list of values or a range {{low, high, log, step}}, not {shown}")
        numbers = [value for name, value in axis.items() if name != "log"]
        if not all(isinstance(value, int | float) and not isinstance(value, bool) for value in numbers):
            raise UserError(f"{where}: low, high and step must be numbers, not {shown} (YAML wants 1.0e-5 for 1e-5)")
        whole = all(isinstance(value, int) for value in numbers)
        kind = distributions.IntDistribution if whole else distributions.FloatDistribution
        try:
            return kind(**axis)
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: {error}") from error


def best(results: Sequence[ArmResult], search: Search) -> str:
    """The best arm in words, or that there is none."""
    known = [result for result in results if is_finite(result.numbers.get(search.metric, math.nan))]
    if not known:
        return f"no trial has finished with a finite {search.metric}"
    choose = min if search.direction == "minimize" else max
    first = choose(known, key=lambda result: result.numbers[search.metric])
    settings = ", ".join(f"{key} = {label(value)}" for key, value in first.arm.settings.items())
    return f"best: {first.arm.name} with {search.metric} {first.numbers[search.metric]:.6g} ({settings})"
