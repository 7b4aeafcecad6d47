"""`opcd chat MODEL`: ask a student, its base model, and the base model with the context the same questions.

opcd chat runs/version_0 --context context.txt
opcd chat org/name --context context.txt --beside org/other < questions.txt
"""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields

import torch
from jsonargparse import ArgumentParser, Namespace

from opcd.chat.chat_models import Origin, Source, Speaker
from opcd.chat.display import show_answers
from opcd.cli.evaluate import torch_device
from opcd.data import Placement
from opcd.data.contexts import read_context
from opcd.modules.lm.generation import Sampling
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import check_text
from opcd.runtime.output import Screen

DESCRIPTION = """Ask a model questions beside its base model (or --beside). With --context, the base model also answers
with the context, as the teacher does. At a terminal each model has a conversation of its own, with its own answers,
until /reset. /help lists the commands, /quit or Ctrl-D ends. A pipe can give questions too, one per line, each on its
own."""
QUIT = "/quit"
RESET = "/reset"
HELP = "/help"
COMMANDS = {
    HELP: "this list",
    RESET: "forget the conversation",
    QUIT: "end, as Ctrl-D does; Ctrl-C ends in the middle of an answer",
}


def main(args: list[str]) -> int:
    """Ask and show until the questions end. Returns 0; UserError for mistakes of the user."""
    options, sampling = _parse(args)
    device = torch_device(options.device)
    speakers = _speakers(options)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        _banner(speakers)
    for speaker in speakers:
        speaker.source.load(device)
    torch.manual_seed(options.seed)
    console = Screen(force_terminal=interactive)
    talk = interactive and speakers[-1].takes_turns
    for question in _questions(interactive):
        if interactive and question == HELP:
            print("\n".join(f"{known:<8}{text}" for known, text in COMMANDS.items()))
            continue
        if interactive and question == RESET:
            for speaker in speakers:
                speaker.turns.clear()
            print("The conversation is forgotten.")
            continue
        if not interactive:
            print(f"> {question}")
        said = [len(speaker.turns) for speaker in speakers]
        try:
            check_text(question, "the question")
            if interactive and re.fullmatch(r"/[a-z]+", question):  # a misspelt command
                raise UserError(f"no command {question}{did_you_mean(question, COMMANDS, f'; {HELP} lists them')}")
            show_answers(console, speakers, question, sampling, talk)
        except UserError as error:
            if not interactive:
                raise
            for speaker, turns in zip(speakers, said, strict=True):
                del speaker.turns[turns:]  # no model keeps a question that one could not take
            print(f"opcd: error: {error}", file=sys.stderr)
    return 0


def make_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="opcd chat", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "model", metavar="MODEL", help="a run (its student), a folder of a model or adapter, or a hub id"
    )
    context = "file with a context: the model beside (else MODEL) answers with it too"
    parser.add_argument("--context", type=str, help=context)
    parser.add_argument("--beside", type=str, help="the model beside; default: the base of MODEL, if known")
    parser.add_argument(
        "--placement", type=Placement | None, help="place of the context; default: the run's, or system"
    )
    parser.add_argument("--template", type=str, help="joins {context} and {query}; default: the run's")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--device", type=str, help="a torch device; default: a GPU if there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the models")
    parser.add_argument("--pickled_weights", action="store_true", help="read pickled weights")
    parser.add_class_arguments(Sampling, None)
    parser.set_defaults({"temperature": 0.0, "max_new_tokens": 256})
    return parser


def _banner(speakers: list[Speaker]) -> None:
    print("opcd chat: each question goes to " + ", then to ".join(speaker.title for speaker in speakers))
    alone = (
        ""
        if speakers[-1].takes_turns
        else "Without a chat template (placement raw) each question is asked on its own. "
    )
    print(f"{alone}{HELP} lists the commands, {QUIT} ends. Loading ...", flush=True)


def _parse(args: list[str]) -> tuple[Namespace, Sampling]:
    options = make_parser().parse_args(args)
    try:
        return options, Sampling(**{field.name: options[field.name] for field in fields(Sampling)})
    except ValueError as error:
        raise UserError(str(error)) from error


def _speakers(options: Namespace) -> list[Speaker]:
    """The models from left to right, checked before weights are loaded."""
    trust = {name: options[name] for name in ("trust_remote_code", "pickled_weights")}
    origin = Origin.of(options.model, **trust)
    base = origin.base if options.beside is None else Origin.of(options.beside, "--beside", **trust).config
    if options.context is None:
        for name in ("placement", "template"):
            if options[name] not in (None, "raw"):
                raise UserError(f"--{name} has no effect without --context; remove it, or name a context")
    context = None if options.context is None else read_context(options.context, "--context")
    placement = options.placement or origin.data.get("placement", "system")
    own = options.placement is None and options.template is None
    template = origin.data.get("template") if own else options.template
    model = Speaker(options.model, Source(origin.config, "MODEL"), None, placement, None)
    before = model if base is None else Speaker(base.name, Source(base, "--beside"), None, placement, None)
    speakers = [] if before is model else [before]
    if context is not None:
        speakers.append(Speaker(f"{before.title} with the context", before.source, context, placement, template))
    return [*speakers, model]


def _questions(interactive: bool) -> Iterator[str]:
    """Yield questions until /quit or the end of the input."""
    try:
        for line in _typed() if interactive else sys.stdin:
            question = line.strip()
            if question == QUIT:
                return
            if question:
                yield question
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not valid UTF-8 ({error.reason}); questions must be UTF-8") from error


def _typed() -> Iterator[str]:
    """Yield lines typed at a prompt, with the keys and history of readline if installed."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
