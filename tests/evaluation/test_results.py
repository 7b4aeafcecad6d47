"""Metrics of rows, by hand."""

import pytest

from opcd.evaluation.intervals import wilson
from opcd.evaluation.scores import difference, summarise
from opcd.runtime.errors import UserError
from tests.helpers.task_rows import scored_rows


def test_a_share_has_wilsons_interval():
    metric = summarise(scored_rows([True], [False], [True], [True]), ["right"])["right"]
    assert (metric.value, metric.low, metric.high) == (0.75, *wilson(3, 4))


@pytest.mark.case("C23")
@pytest.mark.parametrize(("right", "bounds"), [(False, (0, wilson(0, 3)[1])), (True, (wilson(3, 3)[0], 1))])
@pytest.mark.parametrize("answers", [2, 3])
def test_no_rate_is_certain_because_all_answers_are_alike(right, bounds, answers):
    for name, metric in summarise(scored_rows(*[[right] * answers] * 3), ["right"]).items():
        assert (metric.value, metric.low, metric.high) == pytest.approx((float(right), *bounds)), name
    metric = summarise(scored_rows(*[[[right] * answers]] * 3), ["right"])["right"]  # instructions of one prompt
    assert (metric.low, metric.high) == pytest.approx(bounds)


@pytest.mark.case("C23")
def test_a_rate_that_is_the_same_for_every_question_has_a_width():
    metric = summarise(scored_rows(*[[True, False]] * 8), ["right"])["right"]
    assert 0 < metric.low < metric.value == 0.5 < metric.high < 1
    gap = difference(scored_rows(*[[True]] * 8), scored_rows(*[[False]] * 8), "right")
    assert gap.value == gap.high == 1 and 0 < gap.low < 1


def test_instructions_count_one_by_one():
    metric = summarise(scored_rows([[True, False, True]], [[False]]), ["right"])["right"]
    assert metric.value == 0.5
    assert (metric.low, metric.high) == pytest.approx((0.0, 2 / 3))  # of prompts drawn whole


def test_a_number_is_no_share_even_where_it_is_one():
    metric = summarise(scored_rows([1], [1], name="tokens"), ["tokens"])["tokens"]
    assert (metric.value, metric.low, metric.high) == (1.0, 1.0, 1.0)


def test_several_answers_to_a_question():
    metrics = summarise(scored_rows([True, False, False], [False, False, False], [True, True, True]), ["right"])
    assert list(metrics) == ["right", "avg@3", "pass@1", "pass@2", "pass@3"]
    assert metrics["avg@3"].value == pytest.approx(metrics["pass@1"].value) == pytest.approx(4 / 9)
    assert metrics["pass@2"].value == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metrics["pass@3"].value == pytest.approx(2 / 3)


def test_a_difference_is_paired():
    one, other = scored_rows([True], [True], [False], [True]), scored_rows([False], [False], [True], [False])
    gap = difference(one, other, "right")
    assert gap.value == 0.5
    same = difference(one, one, "right")
    share = wilson(0, 4)[1]  # of questions with another answer, none of which was seen; unpaired shares are far wider
    assert (same.value, same.low, same.high) == (0.0, -share, share)
    with pytest.raises(UserError, match="same questions"):
        difference(one, other[:3], "right")
