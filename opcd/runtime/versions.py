"""The version of opcd, and those of the packages beside it."""

import importlib.metadata

VERSION = "0.1.0"
"""That of opcd; pyproject.toml reads it here, so that a clone knows it where nothing is installed."""


def installed_version(name: str) -> str | None:
    """The version of a package of this environment, or None where it is not installed; `opcd` is this project."""
    if name == "opcd":  # pip knows another project by that name
        return VERSION
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
