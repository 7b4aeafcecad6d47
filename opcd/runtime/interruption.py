"""Signals that ask a run to end, and the activity that a run shows between its steps.

A signal handler only takes a note. Code that takes long calls `check` where it may stop: between two tokens of a
rollout, two layers of a model, two micro-batches. Nothing stops within an optimizer step or a save.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from opcd.runtime.errors import StepAbandoned


class Interrupted(BaseException):
    """The end of a run that a signal asked for. No `Exception`, so that no handler of errors catches it.

    Args:
        number: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name}: asked to end")
        self.number = number

    @property
    def exit_code(self) -> int:
        """130 after SIGINT (Ctrl-C), else 143, as after SIGTERM."""
        return 130 if self.number == signal.SIGINT else 143


class _Note:
    """The state of this process: signals and output belong to the process, not to an object."""

    number = 0
    """The signal that asked the run to end; 0 for none."""
    apart = True
    """Whether this rank may stop without the others."""
    show: Callable[[str, str], None] | None = None
    """Takes the activity, and its progress ("" if unknown)."""


def doing(what: str, how_far: str = "") -> None:
    """Show an activity (loading, sample answers, a first pass over a context) and its progress, if anybody listens."""
    if _Note.show is not None:
        _Note.show(what, how_far)


def show_activity(show: Callable[[str, str], None]) -> None:
    """Call `show` with the arguments of `doing` from now on."""
    _Note.show = show


def hide_activity(show: Callable[[str, str], None]) -> None:
    """Call `show` no more."""
    if _Note.show == show:
        _Note.show = None


def leave(number: int, frame: FrameType | None = None) -> None:
    """Raise `Interrupted`: a signal handler. A second signal ends the process at once."""
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


@contextmanager
def leaving_at_once(
    *numbers: signal.Signals, handler: Callable[[int, FrameType | None], None] = leave
) -> Iterator[None]:
    """Let these signals end the block by the handler's exception, until code within installs other handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in former.items():
            signal.signal(number, before)


def ask(number: int) -> None:
    """Note that a signal asks the run to end."""
    _Note.number = number


def asked() -> int:
    """The signal that asked the run to end; 0 where none did."""
    return _Note.number


def reset(apart: bool = True) -> None:
    """Forget the signal. `apart`: no other rank waits for this one."""
    _Note.number, _Note.apart = 0, apart


def check() -> None:
    """Raise `Interrupted` if the run was asked to end and no other rank waits for this one."""
    if _Note.number and _Note.apart:
        raise Interrupted(_Note.number)


@contextmanager
def leaving_together(largest: Callable[[int], int]) -> Iterator[None]:
    """Let `check` or `StepAbandoned` end the block; if one rank must stop, all ranks stop at its end.

    Args:
        largest: returns the largest number of all ranks; every rank must call it.
    """
    apart, _Note.apart = _Note.apart, True
    problem: StepAbandoned | None = None
    try:
        yield
    except Interrupted:
        pass  # the other ranks must hear of the signal first
    except StepAbandoned as error:
        problem = error
    finally:
        _Note.apart = apart
    if number := largest(_Note.number):
        raise Interrupted(number)
    if largest(problem is not None):
        raise problem or StepAbandoned("another rank abandoned the step and says why; --ckpt_path last resumes")
