"""Packages whose names are imported when they are asked for, so that what needs no torch does not wait for it."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package, for the names that its file imports under `if TYPE_CHECKING`.

    The block is the one list of them, for this and for type checkers.
    """
    file = sys.modules[package].__file__
    assert file is not None
    places: dict[str, str] = {}
    for block in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                assert isinstance(node, ast.ImportFrom)
                places |= {alias.name: str(node.module) for alias in node.names}

    def imported(name: str) -> Any:
        """The name, kept in the package from now on."""
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return imported


def all_of(package: str) -> None:
    """Import all that a package has a name for, so that jsonargparse finds classes by their last name."""
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)
