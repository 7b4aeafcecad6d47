"""`opcd completion`: options completed in a shell, recipes completed and checked in an editor.

    eval "$(opcd completion bash)"                            # what your shell's start-up file wants; or zsh, tcsh
    opcd completion jsonschema > recipe.schema.json

With `# yaml-language-server: $schema=recipe.schema.json` as the first line of a recipe, editors that have the YAML
language server (VS Code's YAML extension, Neovim, Emacs and others) complete its keys, say what they mean, and mark
mistakes.
"""

import argparse
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab
from jsonargparse._completions_jsonschema import ParserJsonschema

from opcd.cli import COMMANDS, TRAINER
from opcd.config.parsing import Parser
from opcd.config.plain_errors import concrete

SCHEMA = "jsonschema"
DESCRIBED = ("opcd.", "lightning.", "torch.optim.")
"""Base classes whose subclasses are listed; those of torch.nn.Module would take two minutes."""


def main(args: list[str]) -> int:
    """Print the script or the schema. Returns 0."""
    target = make_parser().parse_args(args).target
    print(json.dumps(recipe_schema()) if target == SCHEMA else shtab.complete(_all_commands(), target))
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd completion", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*shtab.SUPPORTED_SHELLS, SCHEMA], help="a shell, or a schema of recipes")
    return parser


def recipe_schema() -> dict[str, Any]:
    """JSON schema (2020-12) of what `opcd fit --config` reads."""
    from opcd.cli.fit import fit_parser  # seconds, that --help does not wait for

    schema: dict[str, Any] = _Recipes().generate(fit_parser(described=True))  # type: ignore[no-untyped-call]
    return schema


class _Recipes(ParserJsonschema):
    """jsonargparse's schema, with class_path as recipes have it: short, or a class that nobody knows here."""

    def class_ref(self, class_type: Any, action: Any, subclass: bool) -> dict[str, Any]:
        """A class below one of `DESCRIBED`, with its arguments; of any other the class_path alone."""
        if not class_type.__module__.startswith(DESCRIBED):
            return {"anyOf": [{"type": "string"}, self.unknown_class_path_schema()]}
        return dict(super().class_ref(class_type, action, subclass))

    def subclass_def(self, class_type: Any, action: Any) -> dict[str, Any]:
        """The classes that are known, or one of somebody's own, of whose arguments nothing is known."""
        schema = super().subclass_def(class_type, action)
        other = self.unknown_class_path_schema()
        other["properties"]["class_path"]["pattern"] = rf"^(?!{'|'.join(map(re.escape, DESCRIBED))}).*\."
        return {"anyOf": [*schema["anyOf"], other]}

    def callable_schema(self, typehint: Any, action: Any) -> dict[str, Any]:
        """A class whose first argument comes later, such as the weights of an optimizer: nothing is required of it."""
        made = [part for part in _flat((get_args(typehint) or [None])[-1]) if isinstance(part, type)]
        refs = [self.class_ref(part, action, subclass=True) for part in made]
        for name in (ref["$ref"].rpartition("/")[2] for ref in refs if "$ref" in ref):
            for part in self.defs[name].get("anyOf", []):
                part.get("properties", {}).get("init_args", {}).pop("required", None)
                part["required"] = ["class_path"] if "required" in part else []
        return {"anyOf": [{"type": "string"}, *refs]}

    def class_path_schema(self, class_path: str, action: Any) -> dict[str, Any]:
        """A class by its whole name or its last one."""
        schema: dict[str, Any] = super().class_path_schema(class_path, action)
        schema["properties"]["class_path"] = {"enum": [class_path, class_path.rpartition(".")[2]]}
        return schema


def _all_commands() -> argparse.ArgumentParser:
    """One parser with all commands and options, which completes and parses nothing."""
    from opcd.cli.fit import fit_parser

    root = argparse.ArgumentParser(prog="opcd", description="On-policy context distillation.")
    commands = root.add_subparsers()
    fit = fit_parser(described=True)
    for name, text in TRAINER.items():
        _copy(fit, commands.add_parser(name, help=text, add_help=False))
    for name, (module, text) in COMMANDS.items():
        _copy(importlib.import_module(module).make_parser(), commands.add_parser(name, help=text, add_help=False))
    return root


def _copy(parser: argparse.ArgumentParser, to: argparse.ArgumentParser) -> None:
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
    """A type, or those of a union of types and lists of them."""
    if get_origin(hint) in (None, Literal) or isinstance(hint, type):
        yield hint
    else:
        for part in get_args(hint):
            yield from _flat(part)


def _values(hint: Any) -> Iterator[str]:
    """What may be typed where the type allows one of a few words: a literal's, true and false, classes."""
    for part in _flat(hint):
        if get_origin(part) is Literal:
            yield from map(str, get_args(part))
        elif part is bool:
            yield from ("true", "false")
        elif isinstance(part, type) and part.__module__.startswith(DESCRIBED):
            yield from (cls.__name__ for cls in concrete(part))
