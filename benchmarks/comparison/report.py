"""The report: one HTML file without external resources."""

import datetime
import shlex
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from comparison.results import Outcome, cells, header, notes
from opcd.results.pages import render
from opcd.runtime.system_info import machine, versions

PACKAGES = ("opcd", "torch", "transformers", "lightning", "lm-eval", "math-verify", "matplotlib")
SHOWN_QUESTIONS = 4


def report(outcome: Outcome, plots: dict[str, str], command: str) -> str:
    """The HTML text of the page."""
    return render(
        Path(__file__).parent / "report.html.j2",
        title=f"Context distillation: {outcome.plan.benchmark.task.title}",
        command=command,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        header=header(outcome),
        rows=cells(outcome),
        notes=notes(outcome),
        plots={caption: Markup(svg) for caption, svg in plots.items()},
        samples=[_samples(outcome, key) for key in outcome.measures],
        machine=machine(),
        versions=versions(*PACKAGES),
        seeds=outcome.plan.benchmark.seeds,
        commands=[shlex.join(["opcd", *job.words]) for job in outcome.plan.jobs()],
        config=yaml.safe_dump(outcome.plan.config, sort_keys=False),
    )


def _samples(outcome: Outcome, key: str) -> dict[str, Any]:
    """The first questions, with the answers of every arm's first seed."""
    first = {arm.name: arm.answers[key][0] for arm in outcome.arms if any(arm.answers.get(key, []))}
    questions = next(iter(first.values()), [])[:SHOWN_QUESTIONS]
    measure = outcome.measures[key]
    shown = []
    for question in questions:
        answers = [
            {"who": name, "text": row["response"], "right": bool(row[measure.metric])}
            for name, rows in first.items()
            for row in rows
            if row["index"] == question["index"] and row["sample"] == 0
        ]
        reference = question["reference"] if isinstance(question["reference"], str) else ""
        shown.append({"query": question["query"], "reference": reference, "answers": answers})
    return {"title": measure.title, "questions": shown}
