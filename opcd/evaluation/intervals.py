"""95 % intervals of shares, means and differences, and pass@k."""

from collections.abc import Sequence
from math import comb, sqrt
from statistics import NormalDist

Interval = tuple[float, float]
Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 2000


def wilson(successes: float, trials: int) -> Interval:
    """Wilson's score interval of a share (Wilson 1927): it holds at 0 and 1, where the usual one has no width."""
    share, spread = successes / trials, Z**2 / trials
    centre = share + spread / 2
    width = Z * sqrt(share * (1 - share) / trials + spread / (4 * trials))
    low, high = (centre - width) / (1 + spread), (centre + width) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def bootstrap(
    sums: Sequence[float], counts: Sequence[float], span: tuple[float, float] | None = None
) -> Interval | None:
    """Percentile interval of sum(sums) / sum(counts) when questions are drawn anew; None for one question.

    Where all questions have one mean m, every draw has it too, which says nothing of questions that were not asked.
    With a span, the interval is then that of the share of such other questions, Wilson's for 0 of n, however far they
    lie: from m + h (least - m) to m + h (greatest - m). For rates of 0 and 1 that is Wilson's interval itself.

    Args:
        sums: a question's sum of values. For a paired difference, the difference of the two.
        counts: how many values that is.
        span: the least and the greatest value that there can be: (0, 1) for a rate, (-1, 1) for a difference of two.
    """
    if len(sums) < 2:
        return None
    means = [top / bottom for top, bottom in zip(sums, counts, strict=True) if bottom]
    if span is not None and means and max(means) - min(means) < 1e-9:
        mean, share = means[0], wilson(0, len(means))[1]
        return mean + share * (span[0] - mean), mean + share * (span[1] - mean)
    import numpy as np  # half a second, that those who only read results need not wait

    tops, bottoms = np.asarray(sums, dtype=float), np.asarray(counts, dtype=float)
    random = np.random.default_rng(0)  # its own generator: training's is not touched
    draws = (random.integers(len(tops), size=len(tops)) for _ in range(RESAMPLES))
    low, high = np.quantile([tops[draw].sum() / bottoms[draw].sum() for draw in draws], [0.025, 0.975])
    return float(low), float(high)


def pass_at_k(right: int, samples: int, k: int) -> float:
    """Probability that one of k answers is right, without bias from n samples (Chen et al. 2021, arXiv:2107.03374).

    1 - C(n - c, k) / C(n, k), with c of n right.
    """
    if not 1 <= k <= samples or not 0 <= right <= samples:
        raise ValueError(f"pass@k wants 1 <= k <= samples and 0 <= right <= samples, got {k}, {samples}, {right}")
    return 1 - comb(samples - right, k) / comb(samples, k)
