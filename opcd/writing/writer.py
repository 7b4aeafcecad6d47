"""The seam between a loop and the model that writes for it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from opcd.data.example import Message


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


class Writer(ABC):
    """A model that continues conversations, with its own sampling settings.

    Draws come from torch's default generator. The loop seeds it before every call of `Problems.attempt`: a batch is the
    same when it is computed again after a kill.
    """

    @abstractmethod
    def write(self, conversations: Sequence[list[Message]], context: str | None = None) -> list[Written]:
        """Continue each conversation once, all in one batch.

        Args:
            conversations: chat messages, ending with the user's. They may have different numbers of messages; the
                caller leaves out finished conversations.
            context: a text in every prompt, placed as in the distillation (config keys `placement`, `template`). Its
                keys and values are computed once for all conversations and calls. None: no context.

        Raises:
            UserError: a prompt does not fit into the model's window.
        """
