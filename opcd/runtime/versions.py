"""The version of opcd, and those of the packages beside it."""

import importlib.metadata

VERSION = "0.1.0"
"""The version of opcd. pyproject.toml reads it here, so that a clone knows it without an installation."""


def installed_version(name: str) -> str | None:
    """The version of an installed package, or None. `opcd` is this project: on PyPI it is another one."""
    if name == "opcd":
        return VERSION
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
