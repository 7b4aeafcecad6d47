"""The answers and metrics of all arms, and the table in Markdown, CSV and JSON."""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from comparison.arms import BASE, IN_CONTEXT, SAMPLES, TRAINED, Measure, Plan
from opcd.evaluation.intervals import wilson
from opcd.evaluation.scores import Metric, difference, summarise
from opcd.results.run_files import Series, figures, read_jsonl, read_metrics, right_over_steps
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.runtime.output import csv_cell
from opcd.sweep.job_engine import Engine
from opcd.sweep.jobs import JobFolder
from opcd.sweep.summary import markdown_table
from opcd.tasks.matching import right

REFERENCES = ("off-policy, forward KL", BASE)  # other arms are compared with the first of these

Answers = list[dict[str, Any]]
"""Rows in the format of `opcd evaluate`."""


@dataclass
class Score:
    """The result of one measure of an arm."""

    seeds: list[float] = field(default_factory=list)
    """The metric of each seed that finished."""
    questions: int = 0
    mean: Metric | None = None
    """The mean over seeds, with a 95 % interval over questions."""
    spread: float | None = None
    """Sample standard deviation over seeds; None for one."""
    gap: Metric | None = None
    """The difference to the reference arm on the same questions, with the paired 95 % interval."""


@dataclass
class ArmOutcome:
    """All results of an arm."""

    name: str
    scores: dict[str, Score]
    """By key of the measure: task, forgetting."""
    answers: dict[str, list[Answers]]
    """By key of the measure, one list per seed."""
    metrics: list[Series] = field(default_factory=list)
    """metrics.csv of each seed's fit."""
    curves: list[list[tuple[int, float]]] = field(default_factory=list)
    """(step, the task's metric) of each seed, if it was measured during training."""
    seconds: list[float] = field(default_factory=list)
    """Seconds of each fit, with start-up and sample answers."""
    step_seconds: list[float] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    recovery: list[float] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    """Jobs that did not finish."""


@dataclass
class Outcome:
    """The results of a comparison."""

    plan: Plan
    arms: list[ArmOutcome]
    reference: str | None

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures `task` and `forgetting`."""
        return self.plan.benchmark.measures


def collect(plan: Plan, engine: Engine) -> Outcome:
    """Read the results of the finished jobs."""
    arms = [_arm(name, plan, engine) for name in plan.benchmark.arms]
    known = {arm.name: arm for arm in arms}
    reference = next((name for name in REFERENCES if name in known), None)
    for key, measure in plan.benchmark.measures.items():
        base = _pooled(known[reference].answers.get(key, [])) if reference else []
        for arm in arms:
            score = arm.scores[key] = _score(arm.answers.get(key, []), measure)
            if base and score.seeds and arm.name != reference:
                score.gap = difference(_pooled(arm.answers[key]), base, measure.metric)
    return Outcome(plan, arms, reference)


def _arm(name: str, plan: Plan, engine: Engine) -> ArmOutcome:
    arm, task = ArmOutcome(name, {}, {}), plan.benchmark.task
    fits = plan.fits.get(name, [])
    for fit in fits:
        if engine.tasks[fit.name].status != "finished":
            arm.failed.append(fit.name)
            continue
        run = JobFolder(plan.root, fit).run
        numbers = figures(run)
        arm.metrics.append(read_metrics(run))
        arm.seconds.append(engine.tasks[fit.name].seconds)
        arm.step_seconds.append(numbers["seconds/step"])
        arm.peak_mib.append(numbers["memory/peak_mib"])
        arm.recovery += [numbers[name] for name in ("context/recovery",) if name in numbers]
        arm.drift += [numbers[name] for name in ("context/drift",) if name in numbers]
        column = f"eval/{task.name}/{task.metric}"
        sampled = right_over_steps(run) if task.name == SAMPLES else []
        arm.curves.append(sampled or arm.metrics[-1].get(column, []))
    for by_seed in plan.evaluations[name]:
        for key, job in by_seed.items():
            if engine.tasks[job.name].status == "finished":
                rows = read_jsonl(plan.root / job.name / f"{plan.measured[key].name}.jsonl")
                arm.answers.setdefault(key, []).append(rows)
            else:
                arm.failed.append(job.name)
    if task.name == SAMPLES:
        arm.answers["task"] = _samples(name, plan, engine)
    return arm


def _samples(name: str, plan: Plan, engine: Engine) -> list[Answers]:
    """Sample answers as rows of an evaluation: after training, or for an untrained arm before training."""
    every = [fit for fits in plan.fits.values() for fit in fits]
    fits = plan.fits[name] if name in TRAINED else every
    found = []
    for fit in fits:
        rows = read_jsonl(JobFolder(plan.root, fit).run / "samples.jsonl")
        if engine.tasks[fit.name].status != "finished" or name not in (*TRAINED, BASE, IN_CONTEXT):
            continue
        step = max(row["step"] for row in rows) if name in TRAINED else 0
        chosen = [r for r in rows if r["step"] == step and r["context"] is (name == IN_CONTEXT)]
        answered = [row for row in chosen if row["reference"] is not None]
        found.append(
            [
                {"index": n, "sample": 0, "query": r["query"], "response": r["answer"], "reference": r["reference"]}
                | {"accuracy": right(r)}
                for n, r in enumerate(answered)
            ]
        )
    return found if name in TRAINED else found[:1]


def _pooled(answers: list[Answers]) -> Answers:
    """The answers of all seeds, as several samples of the same questions."""
    return [row | {"sample": (seed, row["sample"])} for seed, rows in enumerate(answers) for row in rows]


def _score(answers: list[Answers], measure: Measure) -> Score:
    if not any(answers):
        return Score()
    if measure.metric not in answers[0][0]:
        scores = ", ".join(key for key, value in answers[0][0].items() if isinstance(value, bool | list))
        raise UserError(f"{measure.name} has no metric {measure.metric!r}; there are {scores}")
    seeds = [summarise(rows, [measure.metric])[measure.metric].value for rows in answers]
    questions = len({row["index"] for row in answers[0]})
    mean = summarise(_pooled(answers), [measure.metric])[measure.metric]
    if isinstance(answers[0][0][measure.metric], bool):
        mean = Metric(mean.value, *wilson(mean.value * questions, questions))
    spread = statistics.stdev(seeds) if len(seeds) > 1 else None
    return Score(seeds, questions, mean, spread)


def header(outcome: Outcome) -> list[str]:
    """The columns of the table."""
    columns = ["arm", "seeds"]
    for measure in outcome.measures.values():
        columns += [f"{measure.title}, %", "95 % interval"]
        columns += [f"minus {outcome.reference}, points"] if outcome.reference else []
    return [*columns, "recovery, %", "drift, nats a token", "seconds a step", "seconds of training", "peak GiB"]


def cells(outcome: Outcome) -> list[list[str]]:
    """The rows of the table as text."""
    return [_cells(arm, outcome) for arm in outcome.arms]


def _cells(arm: ArmOutcome, outcome: Outcome) -> list[str]:
    count = max((len(score.seeds) for score in arm.scores.values()), default=0)
    row = [arm.name + (f" ({len(arm.failed)} jobs failed)" if arm.failed else ""), str(count)]
    for key in outcome.measures:
        score = arm.scores[key]
        spread = "" if score.spread is None else f" ± {100 * score.spread:.1f}"
        row += [f"{100 * score.mean.value:.1f}{spread}" if score.mean else "-", interval(score.mean)]
        if outcome.reference:
            row.append(f"{100 * score.gap.value:+.1f} ({interval(score.gap)})" if score.gap else "-")
    row.append(f"{100 * statistics.fmean(arm.recovery):.0f}" if arm.recovery else "-")
    row.append(f"{statistics.fmean(arm.drift):.3f}" if arm.drift else "-")
    for values, unit in ((arm.step_seconds, 1), (arm.seconds, 1), (arm.peak_mib, 1024)):
        row.append(f"{statistics.fmean(values) / unit:.1f}" if values else "-")
    return row


def interval(metric: Metric | None) -> str:
    """The interval in points, or a dash."""
    if metric is None or metric.low is None or metric.high is None:
        return "-"
    return f"{100 * metric.low:.1f} to {100 * metric.high:.1f}"


def notes(outcome: Outcome) -> list[str]:
    """The notes below the table."""
    lines = [
        "Mean over seeds ± sample standard deviation over seeds. Untrained arms are measured once.",
        "95 % intervals are over questions: Wilson's for the mean over seeds, which answer the same questions, and the "
        "paired bootstrap's for differences on the same questions. They do not include the spread over seeds.",
        "Seconds of training are those of the whole `opcd fit` process with its start-up and sample answers, beside "
        "any other jobs that ran at the same time.",
    ]
    for key, measure in outcome.measures.items():
        count = max((arm.scores[key].questions for arm in outcome.arms), default=0)
        rule = "right if the answer contains the reference" if measure.name == SAMPLES else measure.metric
        rows = measure.games.get("init_args") or measure.data or ("data.val" if measure.name == SAMPLES else "the hub")
        lines.append(f"{measure.title}: {count} questions, {measure.name} ({rule}), rows of {rows}.")
    return lines


def write_tables(out: Path, outcome: Outcome) -> str:
    """Write table.md, table.csv and table.json. Returns the Markdown."""
    titles, rows = header(outcome), cells(outcome)
    markdown = markdown_table(titles, rows) + "\n" + "\n".join(f"- {line}" for line in notes(outcome)) + "\n"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([map(csv_cell, row) for row in (titles, *rows)])
    full = {
        arm.name: {
            "scores": {name: asdict(score) for name, score in arm.scores.items()},
            "training": {"seconds": arm.seconds, "step_seconds": arm.step_seconds, "peak_mib": arm.peak_mib},
            "recovery": arm.recovery,
            "drift": arm.drift,
            "curves": arm.curves,
            "failed": arm.failed,
        }
        for arm in outcome.arms
    }
    whole = {"reference": outcome.reference, "seeds": outcome.plan.benchmark.seeds, "arms": full}
    write_atomic(out / "table.md", markdown)
    write_atomic(out / "table.csv", text.getvalue())
    write_atomic(out / "table.json", json.dumps(whole, indent=1) + "\n")
    return markdown
