"""Relative paths in a recipe: from the working folder, or else from the recipe's folder.

A path that exists from the working folder is kept. A path that exists from the recipe's folder alone is replaced, so
that the config of the run holds the path that was taken.
"""

import os
import re
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, get_loader, set_loader
from jsonargparse._actions import ActionConfigFile

from opcd.runtime.files.safe_yaml import bounded

NO_INPUT = ("class_path", "default_root_dir", "dirpath", "filename", "out", "save_dir")
"""Keys whose values are no input files."""
PATH = re.compile(r"[^\n~/][^\n]*(/[^\n]*|\.\w+)")
"""A possible relative path: it has a slash or a suffix."""
_read_yaml = get_loader("yaml")
_working: ContextVar[Path | None] = ContextVar("working folder", default=None)
_missing: dict[str, Path] = {}
"""Paths that exist from neither folder -> the recipe's folder."""
_told: set[str] = set()


class ReadRecipe(ActionConfigFile):
    """The option --config FILE, which replaces relative paths in the file."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: Any = None) -> None:
        """Read the file, in whose folder jsonargparse works meanwhile. A message about a key names the file."""
        token = _working.set(Path.cwd())
        try:
            super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]
        except ArgumentError as error:
            raise ArgumentError(None, f"{values}: {error}") from error
        finally:
            _working.reset(token)


def paths_taken(value: Any, folder: Path, working: Path, key: str = "") -> Any:
    """Replace relative paths in the value of a recipe, which lies in `folder`, where the folder is `working`."""
    if isinstance(value, dict):
        return {name: paths_taken(inner, folder, working, str(name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [paths_taken(inner, folder, working, key) for inner in value]
    if not isinstance(value, str) or len(value) >= 4096 or key.rsplit(".", 1)[-1] in NO_INPUT:
        return value
    if PATH.fullmatch(value):
        return _taken(value, folder, working)
    return value


def elsewhere(path: str) -> str:
    """The end of a message about a missing path: the other place that was tried."""
    return f", nor {_missing[path] / path}, beside the recipe" if path in _missing else ""


def _taken(path: str, folder: Path, working: Path) -> str:
    here, there = _is_there(path, working), _is_there(path, folder)
    several = here and there and (working / path).resolve() != (folder / path).resolve()
    if several and path not in _told:
        _told.add(path)
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"opcd: {path} is taken from the working folder {working}, not from {folder}", file=sys.stderr)
    if not here and not there:
        _missing[path] = folder
    if here or not there:
        return path
    found = folder / path
    return str(found.relative_to(working) if found.is_relative_to(working) else found)


def _is_there(path: str, folder: Path) -> bool:
    try:
        if set(path) & set("*?["):
            return any(folder.glob(path))
        return (folder / path).exists()
    except (OSError, ValueError, NotImplementedError):
        return False


def _load(text: str) -> Any:
    value, working, folder = bounded(lambda: _read_yaml(text), text), _working.get(), Path.cwd()
    if working is None or folder == working or not isinstance(value, dict):
        return value
    return paths_taken(value, folder, working)


set_loader("yaml", _load, (yaml.YAMLError,))
