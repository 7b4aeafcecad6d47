"""Which versions of packages are installed."""

import importlib.metadata


def installed_version(name: str) -> str | None:
    """The version of a package of this environment, or None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
