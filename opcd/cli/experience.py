"""`opcd experience`: a model solves problems and writes lessons, and the best list of lessons is selected.

    opcd experience --config configs/experience_math.yaml --out runs/experience
    opcd fit --config configs/cross_size.yaml --data.context runs/experience/context.txt

The same command continues after a stop.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser

from opcd.cli.evaluate import torch_device
from opcd.cli.fit import fit_parser
from opcd.cli.pages.show import print_run
from opcd.cli.sweep import INTERRUPTED
from opcd.data.chat_template import TextEncoder
from opcd.experience.experience_config import Experience, made
from opcd.experience.experience_folder import PROMPTS, fingerprint
from opcd.experience.lessons import Growth
from opcd.experience.loop import Loop
from opcd.experience.rounds import Rounds, check_rounds
from opcd.experience.writers import ModelWriters, Writers
from opcd.models import load_tokenizer
from opcd.runtime.errors import UserError
from opcd.runtime.files.recipe_paths import ReadRecipe
from opcd.runtime.lazy import all_of
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.job_engine import Engine, explain, locked
from opcd.sweep.launchers import LocalLauncher
from opcd.writing.claimed_folder import claim
from opcd.writing.prompt_files import Prompt

DESCRIPTION = """Make a list of lessons: solve problems, extract lessons from the attempts, accumulate them in lists,
and select the list that helps most on validation problems. With rounds, distil it into the student, and repeat.

--model NAME and --student NAME are short for --model.name NAME and --student.name NAME."""

all_of("opcd.experience")  # a config may name a class by its last name
MakeWriters = Callable[[Experience, torch.device], Writers]


@dataclass
class Output:
    """The outputs."""

    out: str = "runs/experience"
    """A folder. The same command with the same folder continues after a stop."""
    device: str | None = None
    """A torch device, such as cuda:0 or cpu; null takes a GPU if there is one."""


def main(args: list[str], writers: MakeWriters = ModelWriters) -> int:
    """Run the loop, or rounds of it. Returns 0, or 1 if a distillation failed.

    Args:
        args: the words after `opcd experience`.
        writers: makes the models.

    Raises:
        UserError: the config, a file or a model is wrong, or no list could be made.
    """
    parser = make_parser()
    options = parser.parse_args([re.sub(r"^--(model|student)(?=$|=)", r"--\1.name", arg) for arg in args])
    plain = yaml.safe_load(parser.dump(options, skip_unset=False, format="yaml"))
    try:
        objects = parser.instantiate_classes(options)
        config, output = made(objects), Output(**{each.name: objects[each.name] for each in fields(Output)})
    except ValueError as error:
        raise UserError(str(error)) from error
    run = _Run(config, Path(output.out).absolute(), torch_device(output.device), writers)
    checker = ConfigChecker(fit_parser(), config.fit) if config.fit else None
    if checker is not None:
        check_rounds(config, checker)
    with locked(run.out) as lock:
        claim(run.out, {key: value for key, value in plain.items() if key not in ("out", "device")} | run.inputs)
        try:
            if checker is None:
                run.loop(config, run.out, 0).run()
                print_run(run.out)
                return 0
            engine = Engine(run.out, LocalLauncher(1, lock), 1)
            failed = Rounds(config, run.out, checker, engine, run.loop).run()
        except KeyboardInterrupt:
            print(f"stopped; finished work is in {run.out}, and the same command continues there")
            return INTERRUPTED
    if failed:
        print(f"a distillation failed; the same command tries it again\n{explain(failed)}")
        return 1
    print_run(run.out)
    return 0


def make_parser() -> ArgumentParser:
    """The options of the dataclasses; --config reads a YAML file with the same keys."""
    parser = ArgumentParser(prog="opcd experience", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action=ReadRecipe, help="YAML file with the keys below")
    parser.add_class_arguments(Experience, None)
    parser.add_class_arguments(Output, None)
    return parser


class _Run:
    """The parts that all rounds share. Makes all checks that need no weights."""

    def __init__(self, config: Experience, out: Path, device: torch.device, writers: MakeWriters) -> None:
        self.out, self._device, self._make_writers = out, device, writers
        stage = config.extract
        known = {"transcript", "outcome", "lessons", "marker"}
        hidden = {"outcome": not stage.show_outcome, "lessons": not stage.show_earlier}
        needed = {name for name in known if not hidden.get(name)}
        self.prompts = {
            "extract": Prompt(PROMPTS / "extract.txt", stage.prompt, "extract.prompt", known, needed),
            "context": Prompt(
                PROMPTS / "context.txt", config.lessons.prompt, "lessons.prompt", {"lessons"}, {"lessons"}
            ),
        }
        self.inputs = _checked_items(config) | {
            "text of extract.prompt": self.prompts["extract"].text,
            "text of lessons.prompt": self.prompts["context"].text,
        }
        text = TextEncoder(load_tokenizer(config.student, "student"))
        self._growth = Growth(
            render=lambda lessons: self.prompts["context"](lessons=list(lessons)),
            count=lambda value: len(text.data(value)),
            max_tokens=config.lessons.max_tokens,
            near=config.lessons.near,
        )
        self._first = (config, writers(config, device))

    def loop(self, config: Experience, folder: Path, round_number: int) -> Loop:
        """The loop of a round."""
        first, writers = self._first
        if config is not first:
            writers = self._make_writers(config, self._device)
        return Loop(config, self.prompts, self._growth, writers, folder, round_number)


def _checked_items(config: Experience) -> dict[str, Any]:
    """Check the items of both parts. Returns their fingerprints.

    Raises:
        UserError: a part is empty, the two overlap, or there are fewer training items than steps.
    """
    training, validation = config.problems.training(), config.problems.validation()
    if not validation:
        raise UserError("problems: there are no validation items, which select a list")
    if len(training) < config.steps:
        raise UserError(
            f"steps: each list learns from {config.steps} training items, but problems has {len(training)}; "
            "lower steps, or give more"
        )
    if both := set(training) & set(validation):
        raise UserError(
            f"problems: {len(both)} of {len(validation)} validation items are training items too, such as "
            f"{sorted(both)[0]}; a list must be selected on items that it has not learnt from"
        )
    return {"training items": fingerprint(training), "validation items": fingerprint(validation)}
