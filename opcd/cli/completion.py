"""`opcd completion`: complete commands, options and values in a shell.

    eval "$(opcd completion bash)"                            # or zsh, tcsh

Put this line into the start-up file of your shell.
"""

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab

from opcd.cli import COMMANDS, TRAINER
from opcd.config.config_errors import concrete
from opcd.config.parsing import Parser

DESCRIBED = ("opcd.", "lightning.", "torch.optim.")
"""Modules of base classes whose subclasses are listed. Those of torch.nn.Module would take two minutes."""


def main(args: list[str]) -> int:
    """Print the script. Returns 0."""
    shell = make_parser().parse_args(args).shell
    from opcd.cli.fit import fit_parser  # takes seconds, which --help does not need

    root = argparse.ArgumentParser(prog="opcd", description="On-policy context distillation.")
    commands = root.add_subparsers()
    fit = fit_parser(described=True)
    for name, text in TRAINER.items():
        _copy(fit, commands.add_parser(name, help=text, add_help=False))
    for name, (module, text) in COMMANDS.items():
        _copy(importlib.import_module(module).make_parser(), commands.add_parser(name, help=text, add_help=False))
    print(shtab.complete(root, shell))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell that reads the script")
    return parser


def _copy(parser: argparse.ArgumentParser, to: argparse.ArgumentParser) -> None:
    """Add the options of a parser to another, which shtab completes."""
    for action in parser._actions:
        names = action.option_strings or [action.dest]
        if action.help == argparse.SUPPRESS or names[0].startswith("("):  # jsonargparse's links
            continue
        help = (action.help or "").split("\n")[0].replace("%", "%%")
        if action.nargs == 0:
            to.add_argument(*names, action="store_true", help=help)
            continue
        copied = to.add_argument(*names, nargs=None if action.option_strings else action.nargs, help=help)
        hint = getattr(action, "_typehint", action.type)
        copied.choices = action.choices or list(dict.fromkeys(_values(hint))) or None
        if copied.choices is None and {str, Path, None} & {*_flat(hint)}:
            copied.complete = shtab.FILE  # type: ignore[attr-defined]


def _flat(hint: Any) -> Iterator[Any]:
    """The types of a type hint, within unions and lists."""
    if get_origin(hint) in (None, Literal) or isinstance(hint, type):
        yield hint
    else:
        for part in get_args(hint):
            yield from _flat(part)


def _values(hint: Any) -> Iterator[str]:
    """Words that a type allows: literals, true and false, names of classes."""
    for part in _flat(hint):
        if get_origin(part) is Literal:
            yield from map(str, get_args(part))
        elif part is bool:
            yield from ("true", "false")
        elif isinstance(part, type) and part.__module__.startswith(DESCRIBED):
            yield from (cls.__name__ for cls in concrete(part))
