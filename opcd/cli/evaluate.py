"""`opcd evaluate`: evaluate any model on tasks of lm-eval, with the code of the callback `LMEval`.

opcd evaluate smollm2-135m --tasks contains --data.contains ROWS.jsonl --out results/base
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TypeVar

import torch
from jsonargparse import ArgumentParser, Namespace
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress

from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.evaluation_run import Evaluator
from opcd.evaluation.result_files import print_results, refuse_results, write_results
from opcd.evaluation.scores import Metric, Results, Row, difference
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import ReadRecipe
from opcd.runtime.files.user_files import read_jsonl, require_file
from opcd.runtime.output import Screen

Made = TypeVar("Made", Evaluation, "Output")

DESCRIPTION = """Evaluate a model on rows of your own (contains, exact, choice), on DAPO-Math's shape, IFEval and the
paper's system-prompt tasks, on any task of lm-eval, on tasks of a folder of yours (--include_path), and on text games.

The model comes first, or as --model NAME (short for --model.name NAME): a hub id, a folder (such as a run's student/),
a .gguf file, or the packaged smollm2-135m (4-bit weights, unpacked). The task gives the default settings."""


@dataclass
class Output:
    """The outputs of an evaluation."""

    out: str | None = None
    """A folder for results.json and the answers, TASK.jsonl; null only prints the table."""
    against: str | None = None
    """A folder of another evaluation of the same questions, to show differences with paired intervals."""
    device: str | None = None
    """A torch device, such as cuda:0 or cpu; null takes a GPU if there is one."""


def main(args: list[str]) -> int:
    """Parse `args`, evaluate, write and print. UserError for mistakes of the user."""
    model, evaluation, output = parse(_in_full(args))
    evaluator = Evaluator(evaluation, model)
    others = _other_rows(output.against, list(evaluator.answers))
    device = torch_device(output.device)
    if output.out is not None:
        refuse_results(Path(output.out), "out", evaluator.answers)
    student = Student(load_model(model, key="model", device=device).to(device), load_tokenizer(model, "model"))  # type: ignore[arg-type]
    results = _evaluate(evaluator, student)
    differences = _differences(results, others)
    if output.out is not None:
        dtype = str(student.model.dtype).removeprefix("torch.")
        settings = evaluator.settings() | {"dtype": dtype, "device": str(device)}
        about = {"model": model.name, "context": evaluation.context, "seed": evaluation.seed, "settings": settings}
        if output.against is not None:
            about["against"] = output.against
        write_results(Path(output.out), results, differences, about)
    print_results(results, differences, Screen(width=None if Screen().is_terminal else 140))
    return 0


def parse(args: list[str]) -> tuple[ModelConfig, Evaluation, Output]:
    """Parse the words of the command line. UserError if they do not fit together."""
    parser = make_parser()
    config = parser.parse_args(args)
    try:
        made = parser.instantiate(config)
        return made.model, _made(Evaluation, made), _made(Output, made)
    except ValueError as error:
        raise UserError(str(error)) from error


def make_parser() -> ArgumentParser:
    """The options of the three dataclasses; --config reads a YAML file with the same keys."""
    parser = ArgumentParser(prog="opcd evaluate", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ReadRecipe, help="YAML file with the keys below")
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_class_arguments(Evaluation, None)
    parser.add_class_arguments(Output, None)
    return parser


def _made(kind: type[Made], config: Namespace) -> Made:
    return kind(**{field.name: config[field.name] for field in fields(kind)})


def _in_full(args: list[str]) -> list[str]:
    """Write out short forms: a first word MODEL and --model NAME as --model.name NAME, --greedy as --greedy true."""
    full = [re.sub(r"^--model(?=$|=)", "--model.name", arg) for arg in args]
    if full and not full[0].startswith("-"):
        if any(arg.partition("=")[0] == "--model.name" for arg in full):
            raise UserError(f"the model is named twice: {full[0]} and by --model; remove one")
        full = ["--model.name", *full]
    for place, following in reversed(list(enumerate([*full[1:], "--"]))):
        if full[place] == "--greedy" and following.startswith("--"):
            full.insert(place + 1, "true")
    return full


def torch_device(name: str | None) -> torch.device:
    """The torch device of a name; by default a GPU if there is one. UserError if it cannot be used."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: {name}: {str(error).splitlines()[0]}") from error
    return device


def _evaluate(evaluator: Evaluator, student: Student) -> Results:
    """Evaluate, with a bar for each task on a terminal."""
    console = Screen()
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bars = {task: progress.add_task(escape(task), total=total) for task, total in evaluator.answers.items()}
        return evaluator(student, lambda task, done: progress.advance(bars[task], done))


def _other_rows(folder: str | None, tasks: list[str]) -> dict[str, list[Row]]:
    if folder is None:
        return {}
    files = {task: require_file(str(Path(folder) / f"{task}.jsonl"), "against") for task in tasks}
    return {task: [row for _, row in read_jsonl(file, "against")] for task, file in files.items()}  # type: ignore[misc]


def _differences(results: Results, others: dict[str, list[Row]]) -> dict[str, dict[str, Metric]]:
    """Differences for every metric for which answers have scores."""
    return {
        name: {
            metric: difference(results[name].rows, rows, metric)
            for metric in results[name].metrics
            if metric in results[name].rows[0]
        }
        for name, rows in others.items()
    }
