"""What a signal does to the process that gets it; what it does to a run is in the drills."""

import os
import signal
from types import SimpleNamespace

import pytest

from opcd.callbacks import LeaveOnSignal, signals
from opcd.runtime import interruption
from opcd.runtime.errors import StepAbandoned
from opcd.runtime.interruption import Interrupted, leaving_together


@pytest.fixture
def told(monkeypatch):
    """A callback that listens on one rank, and what it would have sent to this process."""
    sent = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(os, "kill", lambda process, number: sent.append(number))
    callback = LeaveOnSignal()
    strategy = SimpleNamespace(launcher=None, cluster_environment=None)
    callback.on_train_start(SimpleNamespace(world_size=1, strategy=strategy, state=SimpleNamespace(fn="fit")), None)
    yield callback._told, sent
    interruption.reset()


def test_the_first_is_noted_and_the_second_ends_at_once(told, monkeypatch):
    tell, sent = told
    interruption.check()
    tell(signal.SIGTERM, None)
    with pytest.raises(Interrupted) as raised:
        interruption.check()
    assert raised.value.exit_code == 143
    tell(signal.SIGTERM, None)  # the same, by way of the process group
    assert sent == []
    monkeypatch.setattr(signals, "SAME", 0.0)
    tell(signal.SIGINT, None)
    assert sent == [signal.SIGINT]


def test_ranks_leave_together():
    interruption.reset(apart=False)
    interruption.ask(signal.SIGINT)
    interruption.check()  # others wait for this rank
    left = []
    with pytest.raises(Interrupted) as raised, leaving_together(lambda number: left.append(number) or number):
        interruption.check()
        left.append("not reached")
    assert left == [signal.SIGINT] and raised.value.exit_code == 130
    interruption.reset(apart=False)
    with pytest.raises(Interrupted), leaving_together(lambda number: signal.SIGTERM):  # another was asked
        left.append("its own block is done first")
    assert left[-1] == "its own block is done first"
    interruption.check()
    interruption.reset()


def test_ranks_abandon_a_step_together():
    """All of them then save the state before it, which takes all."""
    asked = []
    with (
        pytest.raises(StepAbandoned, match="no answer"),
        leaving_together(lambda number: asked.append(number) or number),
    ):
        raise StepAbandoned("no answer")
    assert asked == [0, True]
    answers = iter([0, 1])
    with pytest.raises(StepAbandoned, match="another rank"), leaving_together(lambda number: next(answers)):
        pass
