"""The report: one HTML file that needs no network."""

import datetime
import os
import platform
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from comparison.arms import TRAINED
from comparison.results import Outcome, cells, header, notes
from opcd.doctor import installed_version

PACKAGES = ("opcd", "torch", "transformers", "lightning", "lm-eval", "math-verify", "matplotlib")
SHOWN_QUESTIONS = 4


def report(outcome: Outcome, plots: dict[str, str], command: str) -> str:
    """The page as text."""
    folder = Path(__file__).parent
    environment = Environment(loader=FileSystemLoader(folder), autoescape=True, undefined=StrictUndefined)
    return environment.get_template("report.html.j2").render(
        title=f"Context distillation: {outcome.plan.benchmark.task.title}",
        command=command,
        date=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        header=header(outcome),
        rows=cells(outcome),
        notes=notes(outcome),
        plots={caption: Markup(svg) for caption, svg in plots.items()},
        samples=[_samples(outcome, measure.name, measure.title) for measure in outcome.measures],
        machine=machine(),
        versions={package: installed_version(package) or "not installed" for package in PACKAGES},
        seeds=outcome.plan.benchmark.seeds,
        commands=[shlex.join(["opcd", *job.words]) for job in outcome.plan.jobs()],
        config=yaml.safe_dump(outcome.plan.config, sort_keys=False),
    )


def _samples(outcome: Outcome, measure: str, title: str) -> dict[str, Any]:
    """The first questions with the answer of every arm's first seed."""
    first = {arm.name: arm.answers[measure][0] for arm in outcome.arms if any(arm.answers.get(measure, []))}
    questions = next(iter(first.values()), [])[:SHOWN_QUESTIONS]
    metric = next(m.metric for m in outcome.measures if m.name == measure)
    shown = []
    for question in questions:
        answers = [
            {"arm": name, "text": row["response"], "right": row[metric], "trained": name in TRAINED}
            for name, rows in first.items()
            for row in rows
            if row["index"] == question["index"] and row["sample"] == 0
        ]
        reference = question["reference"] if isinstance(question["reference"], str) else ""
        shown.append({"query": question["query"], "reference": reference, "answers": answers})
    return {"title": title, "questions": shown}


def machine() -> dict[str, str]:
    """Processor, memory, GPUs, system, and the commit of the code."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{os.cpu_count()} cores, {_processor()}",
        "memory": f"{memory:.0f} GiB",
        "GPUs": ", ".join(gpus) or "none",
        "system": f"{platform.platform()}, Python {platform.python_version()}",
        "commit": _commit(),
    }


def _processor() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    try:
        words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(words, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
