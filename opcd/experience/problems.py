"""The interface of the problems of the experience loop: mathematics, games, or a class of the user's own."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opcd.data.example import Message
from opcd.writing.written import Written


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


@dataclass(frozen=True)
class Attempt:
    """An attempt at an item: a line of `attempts.jsonl` or `validation.jsonl`, to which the loop adds its own fields.

    Attributes:
        item: the id of the item.
        transcript: the text that the extractor of lessons reads: the problem and all turns, with headings of the
            implementation's own. It must not hold the reference answer, nor whether the attempt was right.
        outcome: feedback in words, such as "The final answer is wrong." or a game's last message. The extractor sees it
            with `extract.show_outcome`. None: not known.
        success: whether the attempt was right; None: it cannot be judged. Validation attempts need a value.
        tokens: tokens that the model wrote, in all turns.
        cut_off: whether a turn was cut off by the limit of tokens.
        details: other values for readers of the files, as JSON (numbers of turns, invalid moves, ...).
    """

    item: str
    transcript: str
    outcome: str | None
    success: bool | None
    tokens: int
    cut_off: bool
    details: dict[str, Any] = field(default_factory=dict)


class Problems(ABC):
    """Items to attempt: training items, which lessons come from, and validation items, which lists are selected by.

    A config names a subclass by `problems.class_path`; `problems.init_args` are the arguments of its constructor, and
    their docstring lines are the help. The constructor checks its arguments, and must not load a model.

    An item has an id: a text that names the same item in every process (a hash of the problem, a board's seed). An id
    in both parts is an error.

    Every method is called in one process, without gradients.
    """

    @abstractmethod
    def training(self) -> Sequence[str]:
        """The ids of the training items, each once, in a fixed order. Called before a model is loaded.

        Raises:
            UserError: the items cannot be read; names the config key.
        """

    @abstractmethod
    def validation(self) -> Sequence[str]:
        """The ids of the validation items, each once, in a fixed order. Raises as `training` does."""

    @abstractmethod
    def attempt(self, items: Sequence[str], writer: Writer, context: str | None) -> list[Attempt]:
        """Attempt each item once, in order. A call has at most a batch of items (`solve.batch_size`).

        The result must depend only on the arguments and on torch's default generator: seed other generators from the
        item.

        Args:
            items: ids of either part; an id may be there twice.
            writer: the model. Call `writer.write` with `context` unchanged.
            context: the lessons as one text; None: no lessons.

        Raises:
            UserError: a prompt does not fit into the model's window.
        """
