"""How jsonargparse reads options and configs, in every command."""

import argparse
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings

from opcd.runtime.errors import UserError
from opcd.runtime.files import recipe_paths as recipes  # noqa: F401  how it reads YAML

ALLOW = "--allow-imports"
allowed: list[str] = []
"""The option as it was given, for the processes that this one starts."""

# Defaults of other libraries' classes are enums at times, which a config is written with as their values.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
# An empty addition to jsonargparse's list of denied imports (os, subprocess, ...) has it enforced: else it only warns.
set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=[])


class Parser(argparse.ArgumentParser):
    """An argparse parser whose mistakes are told as everywhere else, and whose options are written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise it, in place of the usage and an exit."""
        raise UserError(message)


def allow_imports(args: list[str]) -> list[str]:
    """The arguments without `--allow-imports A.B,C`: what class_path may name although jsonargparse denies it."""
    if ALLOW not in args:
        return args
    place = args.index(ALLOW)
    names = args[place + 1].split(",") if len(args) > place + 1 else []
    try:
        set_parsing_settings(import_path_allowlist=names)
    except ValueError as error:
        raise UserError(f"{ALLOW}: {error}") from error
    if not names:
        raise UserError(f"{ALLOW} wants import paths with commas between them, such as package.module")
    allowed[:] = [ALLOW, args[place + 1]]
    return args[:place] + args[place + 2 :]
