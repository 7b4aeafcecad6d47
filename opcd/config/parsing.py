"""Settings of jsonargparse, and the parser of the commands that read no config."""

import argparse
from enum import Enum
from typing import Any, NoReturn

import yaml
from jsonargparse import set_parsing_settings

from opcd.runtime.errors import UserError
from opcd.runtime.files import recipe_paths as recipes  # noqa: F401  how it reads YAML

ALLOW = "--allow-imports"
allowed: list[str] = []
"""The option and its value, for the processes that this one starts."""

# Some defaults of other libraries' classes are enums: a config has their values.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_data(value.value))
# jsonargparse enforces its list of denied imports (os, subprocess, ...) if something, even nothing, is added to it.
set_parsing_settings(docstring_parse_attribute_docstrings=True, import_path_denylist=[])


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises UserError, and does not take abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of an exit."""
        raise UserError(message)


def allow_imports(args: list[str]) -> list[str]:
    """Apply `--allow-imports A.B,C`, import paths that jsonargparse denies, and return the other arguments."""
    if ALLOW not in args:
        return args
    place = args.index(ALLOW)
    names = args[place + 1].split(",") if len(args) > place + 1 else []
    try:
        set_parsing_settings(import_path_allowlist=names)
    except ValueError as error:
        raise UserError(f"{ALLOW}: {error}") from error
    if not names:
        raise UserError(f"{ALLOW} needs import paths, separated by commas, such as package.module")
    allowed[:] = [ALLOW, args[place + 1]]
    return args[:place] + args[place + 2 :]
