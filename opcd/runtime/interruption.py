"""A signal that asks the run to end, and where a step notices it.

A handler only takes a note. Code that takes long calls `check` where it can be left: between two tokens of a rollout,
between two layers of a model, between two micro-batches. Nothing is left within an optimizer step or a save.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from opcd.runtime.errors import StepAbandoned


class Interrupted(BaseException):
    """The run ends because a signal asked for it. No `Exception`: who handles errors must let it pass.

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
    """What this process was told: signals are the process's, not an object's."""

    number = 0
    """The signal that asked; 0 for none."""
    apart = True
    """Whether this process may leave where it stands, without the other ranks."""


def leave(number: int, frame: FrameType | None = None) -> None:
    """A handler: leave where the process stands (`Interrupted`). A second signal ends it at once, without a word."""
    signal.signal(number, signal.SIG_DFL)
    raise Interrupted(number)


@contextmanager
def leaving_at_once(*numbers: signal.Signals) -> Iterator[None]:
    """A block that these signals end by `Interrupted`, until somebody within listens to them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def ask(number: int) -> None:
    """Take a note that the run is to end."""
    _Note.number = number


def asked() -> int:
    """The signal that asked the run to end; 0 where none did."""
    return _Note.number


def reset(apart: bool = True) -> None:
    """Forget what was asked; `apart`: there are no other ranks that wait for this one."""
    _Note.number, _Note.apart = 0, apart


def check() -> None:
    """Leave, where the run was asked to end and nobody waits for this rank (`Interrupted`)."""
    if _Note.number and _Note.apart:
        raise Interrupted(_Note.number)


@contextmanager
def leaving_together(largest: Callable[[int], int]) -> Iterator[None]:
    """A block that may be left anywhere by `check` or `StepAbandoned`; at its end all ranks leave, if one of them must.

    Args:
        largest: the largest of all ranks' numbers; every rank must call it.
    """
    apart, _Note.apart = _Note.apart, True
    problem: StepAbandoned | None = None
    try:
        yield
    except Interrupted:
        pass  # the others must learn of it first
    except StepAbandoned as error:
        problem = error
    finally:
        _Note.apart = apart
    if number := largest(_Note.number):
        raise Interrupted(number)
    if largest(problem is not None):
        raise problem or StepAbandoned("another rank has abandoned the step and says why; --ckpt_path last goes on")
