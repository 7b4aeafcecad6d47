"""Intervals and pass@k against scipy, and against counting."""

from itertools import combinations

import numpy as np
import pytest
from scipy.stats import binomtest

from opcd.evaluation.intervals import bootstrap, pass_at_k, wilson


@pytest.mark.parametrize(("right", "trials"), [(0, 7), (7, 7), (1, 1), (41, 128), (500, 1000)])
def test_wilson_is_scipys(right, trials):
    expected = binomtest(right, trials).proportion_ci(method="wilson")
    np.testing.assert_allclose(wilson(right, trials), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize("right", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_counts_the_draws_with_a_right_one(right, k):
    answers = [True] * right + [False] * (5 - right)
    draws = list(combinations(answers, k))
    assert pass_at_k(right, 5, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_more_than_there_is():
    with pytest.raises(ValueError, match="k <= samples"):
        pass_at_k(1, 4, 5)


def test_bootstrap_of_a_mean_has_its_standard_error_and_leaves_numpys_generator():
    values = np.random.default_rng(1).normal(size=400)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    low, high = bootstrap(values, [1] * 400)
    error = values.std() / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.3 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.3 * error)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


def test_bootstrap_draws_questions_and_not_values():
    assert bootstrap([4.0, 0.0], [4, 4]) == (0.0, 1.0)
    assert bootstrap([1.0], [1]) is None
