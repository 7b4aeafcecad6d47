"""Alarms on the means of a window, once each."""

import signal
from types import SimpleNamespace

import pytest
import torch

from opcd.callbacks import Alarms
from opcd.modules.step.metrics import repetition
from opcd.runtime.interruption import Interrupted

GOOD = {"finished_fraction": 0.9, "repetition": 0.1, "student_entropy": 2.0, "response_tokens": 20.0}


def step(alarms: Alarms, **changed: float) -> None:
    metrics = {f"train/{name}": value for name, value in (GOOD | changed).items()}
    alarms.on_train_batch_end(SimpleNamespace(callback_metrics=metrics, global_step=7), None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"finished_fraction": 0.05, "response_tokens": 99.0},
            "95% of the responses are cut off at the token limit, 10% at first; they have 99",
        ),
        ({"repetition": 0.8}, "80% of the responses' runs of four tokens are repeated"),
        ({"student_entropy": 0.1}, "entropy is 0.100 nats a token, 2.000 at first: the student collapses"),
    ],
)
def test_an_alarm_rings_once(changed, message):
    alarms = Alarms(window=2)
    for _ in range(3):
        step(alarms)
    step(alarms, **{name: float("nan") for name in changed})  # not a window of its own
    with pytest.warns(UserWarning, match=message):
        for _ in range(2):
            step(alarms, **changed)
    resumed = Alarms(window=2)
    resumed.load_state_dict(alarms.state_dict())
    step(resumed, **changed)  # warnings are errors here


def test_an_engine_that_is_not_the_student_rings_at_its_first_step():
    alarms = Alarms(window=9)
    step(alarms, rollout_logprob_gap=0.04)
    with pytest.warns(UserWarning, match=r"drawn tokens are 0.060 nats from the student's"):
        step(alarms, rollout_logprob_gap=0.06)
    step(alarms, rollout_logprob_gap=0.07)


def test_responses_that_never_end_ring_once():
    alarms = Alarms(window=2)
    step(alarms, finished_fraction=0.3)
    with pytest.warns(
        UserWarning,
        match="95% of the responses are cut off at the token limit, 85% at first: .* raise",
    ):
        for _ in range(4):
            step(alarms, finished_fraction=0.0)
            step(alarms, finished_fraction=0.1)
    step(alarms, finished_fraction=0.0)  # warnings are errors here


def test_repetition():
    said_once, again = torch.arange(10), torch.tensor([1, 2, 3, 4] * 3)
    assert repetition([said_once]) == 0
    assert repetition([again]) == pytest.approx(1 - 4 / 9)
    assert repetition([said_once, again, torch.tensor([2])]) == pytest.approx((1 - 4 / 9) / 3)


@pytest.mark.case("E2")
@pytest.mark.parametrize(
    ("processed", "looked", "seen"),
    [(1, False, 1), (0, False, 0), (1, True, 1)],
    ids=["left after the step, by a callback before", "left within the step", "left by a callback after"],
)
def test_a_step_that_is_done_counts_where_the_run_is_left_after_it(processed, looked, seen):
    alarms = Alarms(window=2)
    current = SimpleNamespace(processed=processed, completed=0)
    trainer = SimpleNamespace(
        callback_metrics={f"train/{name}": value for name, value in GOOD.items()},
        global_step=1,
        state=SimpleNamespace(fn="fit"),
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=current))),
    )
    alarms.on_train_batch_start(trainer, None)
    if looked:
        alarms.on_train_batch_end(trainer, None)
    alarms.on_exception(trainer, None, Interrupted(signal.SIGTERM))
    assert alarms.state_dict()["recent"] == [GOOD] * seen
