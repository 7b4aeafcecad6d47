"""95 % intervals of shares, means and differences, and pass@k."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927). At 0 and 1 it has a width, unlike the normal interval."""
    share, spread = successes / trials, Z**2 / trials
    centre = share + spread / 2
    width = Z * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (centre - width) / (1 + spread), (centre + width) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def bootstrap(
    sums: Sequence[float], counts: Sequence[float], span: tuple[float, float] | None = None
) -> Interval | None:
    """Percentile bootstrap interval of sum(sums) / sum(counts) over questions; None for a single question.

    If all questions have the same mean m, every resample has it too, and the bootstrap interval has no width. With a
    span, the interval then allows for a share h of other questions, the upper end of Wilson's interval for 0 of n:
    from m + h (least - m) to m + h (greatest - m). For rates of 0 and 1, this equals Wilson's interval.

    Args:
        sums: sum of the values of each question; for a paired difference, the difference of the two sums.
        counts: number of values of each question.
        span: the least and the greatest possible value: (0, 1) for a rate, (-1, 1) for a difference of two.
    """
    if len(sums) < 2:
        return None
    means = [top / bottom for top, bottom in zip(sums, counts, strict=True) if bottom]
    if span is not None and means and max(means) - min(means) < 1e-9:
        mean, share = means[0], wilson(0, len(means))[1]
        return mean + share * (span[0] - mean), mean + share * (span[1] - mean)
    import numpy as np  # the import takes half a second, and reading results does not need it

    tops, bottoms = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    random = np.random.default_rng(0)  # a separate generator: training's stays as it is
    draws = (random.integers(len(tops), size=len(tops)) for _ in range(RESAMPLES))
    ratios = [tops[draw].sum() / bottoms[draw].sum() for draw in draws if bottoms[draw].sum()]
    low, high = np.quantile(ratios, [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Unbiased estimate, from n samples with c right, that one of k is right: 1 - C(n - c, k) / C(n, k).

    Source: Chen et al. 2021, arXiv:2107.03374.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@k needs 1 <= k <= samples and 0 <= right <= samples, got {k}, {samples}, {right}")
    return 1 - comb(samples - right, k) / comb(samples, k)
