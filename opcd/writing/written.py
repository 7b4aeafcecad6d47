"""What a model has written."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Written:
    """An answer of a model.

    Attributes:
        text: the text without special tokens.
        tokens: generated tokens, with the end-of-sequence token.
        cut_off: whether the limit of tokens ended it.
    """

    text: str
    tokens: int
    cut_off: bool
