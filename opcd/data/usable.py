"""Rows that prompts can be made of, and the others: an error, or left out and counted."""

from collections.abc import Callable, Sequence

from lightning.pytorch.utilities import rank_zero_warn

from opcd.data.example import Example, OnBadRow
from opcd.runtime.errors import UserError


def usable(
    examples: Sequence[Example], check: Callable[[Example], None], key: str, on_bad_row: OnBadRow
) -> list[Example]:
    """The examples that `check` lets pass.

    Args:
        examples: rows of one split.
        check: raises UserError for a row that cannot be used.
        key: the config key of their source, for messages.
        on_bad_row: raise the first error, or leave all such rows out with one warning.

    Raises:
        UserError: a row cannot be used, or none is left.
    """
    kept, bad = [], []
    for example in examples:
        try:
            check(example)
        except UserError as error:
            if on_bad_row == "raise":
                raise
            bad.append(str(error))
        else:
            kept.append(example)
    if bad:
        rank_zero_warn(f"{key}: {len(bad)} bad rows left out (data.on_bad_row: skip), {len(kept)} kept: {bad[0]}")
    if bad and not kept:
        raise UserError(f"{key}: no row is left; the first: {bad[0]}")
    return kept
