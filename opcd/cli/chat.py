"""`opcd chat MODEL`: the same question to what a student was made from, to that with the context, and to the student.

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

DESCRIPTION = """Ask a model, beside the one that it was made from (or --beside): that one as it is and, with --context
in its prompt, as the teacher sees it. At a terminal each of them has a conversation of its own: it sees the questions
before and its own answers to them, until /reset; /help lists the commands, /quit or Ctrl-D ends. Questions can also
come from a pipe, one a line; each of those stands alone."""
QUIT = "/quit"
RESET = "/reset"
HELP = "/help"
COMMANDS = {
    HELP: "this list",
    RESET: "forget the conversation; the next question stands alone",
    QUIT: "end, as Ctrl-D does; Ctrl-C ends in the middle of an answer",
}


def main(args: list[str]) -> int:
    """Ask and show until there are no more questions. Returns 0; UserError for the user's mistakes."""
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
        if interactive and question in COMMANDS:
            _command(question, speakers)
            continue
        if not interactive:
            print(f"> {question}")
        said = [len(speaker.turns) for speaker in speakers]
        try:
            check_text(question, "the question")
            if interactive:
                _refuse_unknown(question)
            show_answers(console, speakers, question, sampling, talk)
        except UserError as error:
            if not interactive:
                raise
            for speaker, turns in zip(speakers, said, strict=True):
                del speaker.turns[turns:]  # a question that one could not take was asked of none
            print(f"opcd: error: {error}", file=sys.stderr)
    return 0


def make_parser() -> ArgumentParser:
    """The command's options."""
    parser = ArgumentParser(prog="opcd chat", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL", help="a run (its student), a model's or adapter's folder, a hub id")
    parser.add_argument(
        "--context",
        type=str,
        help="file with a context: the one beside (else MODEL) answers with it too",
    )
    parser.add_argument("--beside", type=str, help="another such model; default: what MODEL was made from, where known")
    parser.add_argument("--placement", type=Placement | None, help="the context's place; default: the run's, or system")
    parser.add_argument("--template", type=str, help="joins {context} and {query}; default: the run's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws")
    parser.add_argument("--device", type=str, help="a torch device; default: a GPU where there is one")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the models")
    parser.add_argument("--pickled_weights", action="store_true", help="read weights that are pickles")
    parser.add_class_arguments(Sampling, None)
    parser.set_defaults({"temperature": 0.0, "max_new_tokens": 256})
    return parser


def _banner(speakers: list[Speaker]) -> None:
    """Who answers, and how a chat is led."""
    print("opcd chat: each question goes to " + ", then to ".join(speaker.title for speaker in speakers))
    alone = "" if speakers[-1].takes_turns else "Without a chat template (placement raw) every question stands alone. "
    print(f"{alone}{HELP} lists the commands, {QUIT} ends. Loading ...", flush=True)


def _command(name: str, speakers: list[Speaker]) -> None:
    if name == HELP:
        print("\n".join(f"{known:<8}{text}" for known, text in COMMANDS.items()))
    if name == RESET:
        for speaker in speakers:
            speaker.turns.clear()
        print("The conversation is forgotten.")


def _refuse_unknown(question: str) -> None:
    """A word like a command's is one that was misspelt: no model is asked."""
    if re.fullmatch(r"/[a-z]+", question):
        raise UserError(f"no command {question}{did_you_mean(question, COMMANDS, f'; {HELP} lists them')}")


def _parse(args: list[str]) -> tuple[Namespace, Sampling]:
    options = make_parser().parse_args(args)
    try:
        return options, Sampling(**{field.name: options[field.name] for field in fields(Sampling)})
    except ValueError as error:
        raise UserError(str(error)) from error


def _speakers(options: Namespace) -> list[Speaker]:
    """Who answers, from left to right, all checked before weights are loaded."""
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
    """What is asked, until /quit or the end of the input."""
    for line in _typed() if interactive else _piped():
        question = line.strip()
        if question == QUIT:
            return
        if question:
            yield question


def _typed() -> Iterator[str]:
    """Lines typed at a prompt, with readline's keys and history where there is readline."""
    with suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def _piped() -> Iterator[str]:
    try:
        yield from sys.stdin
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not valid UTF-8 ({error.reason}); questions come as UTF-8") from error
