"""What a run is doing between its steps, for whoever shows it: loading, sample answers, a first pass over a context."""

from collections.abc import Callable

Show = Callable[[str, str], None]
"""Takes what is being done, and how far it is ("" where that is not known)."""

_shown_by: list[Show] = []


def doing(what: str, how_far: str = "") -> None:
    """Say what begins, or how far it is; nothing happens where nobody shows it."""
    for show in _shown_by[-1:]:
        show(what, how_far)


def start(show: Show) -> None:
    """Tell `show` from now on what is being done."""
    stop(show)
    _shown_by.append(show)


def stop(show: Show) -> None:
    """Tell it no more."""
    if show in _shown_by:
        _shown_by.remove(show)
