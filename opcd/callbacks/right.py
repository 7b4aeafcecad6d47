"""Whether a sample answer is right; imports no torch, for those who only read a run's folder."""

import re
from typing import Any


def right(row: dict[str, Any]) -> bool:
    """Whether the answer contains the reference as whole words, in any case: 5 is not in 50, 5:30 or 1,005."""
    if row["reference"] is None:
        return False
    alone = rf"(?<!\w)(?<!\d[.,:]){re.escape(row['reference'])}(?!\w)(?![.,:]\d)"
    return re.search(alone, row["answer"], re.IGNORECASE) is not None
