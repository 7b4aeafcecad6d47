"""Lazy imports: a package imports a name at its first use, so that code without torch starts fast."""

import ast
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def lazily(package: str) -> Callable[[str], Any]:
    """Make the `__getattr__` of a package, for the names that its file imports under `if TYPE_CHECKING`."""
    file = sys.modules[package].__file__
    assert file is not None
    places: dict[str, str] = {}
    for block in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for node in block.body:
                assert isinstance(node, ast.ImportFrom)
                places |= {alias.name: str(node.module) for alias in node.names}

    def imported(name: str) -> Any:
        """Import a name and keep it in the package."""
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(places[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return imported


def all_of(package: str) -> None:
    """Import all public names of a package, so that jsonargparse finds classes by their last name."""
    module = importlib.import_module(package)
    for name in module.__all__:
        getattr(module, name)
