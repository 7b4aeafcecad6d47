"""How long a request that failed waits for its next attempt."""

import random
import time
from email.utils import parsedate_to_datetime

FIRST, LONGEST = 0.25, 30.0
"""Seconds of the first pause at most, and of any: between half of it and all of it is drawn."""

_draw = random.Random()  # a generator of its own: training's draws must not depend on a server's mood


def pause(attempt: int, retry_after: str | None) -> float:
    """Seconds after the n-th attempt (from 1): twice as long each time, a part of it drawn, or what the server asks."""
    longest = min(FIRST * 2.0 ** min(attempt - 1, 16), LONGEST)
    return max(_draw.uniform(longest / 2, longest), _asked(retry_after))


def _asked(retry_after: str | None) -> float:
    """Seconds of a Retry-After, which is a number or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0
