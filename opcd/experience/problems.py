"""What is attempted: the seam between the experience loop and mathematics, games, or anything else one can try."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from opcd.data.example import Message


@dataclass(frozen=True)
class Written:
    """What a model wrote, once.

    Attributes:
        text: without special tokens.
        tokens: tokens that were generated, the end-of-sequence token included.
        cut_off: whether the limit of tokens ended it.
    """

    text: str
    tokens: int
    cut_off: bool


class Writer(ABC):
    """A model as the loop sees it: it continues conversations, and has its sampling settings inside.

    Draws come from torch's default generator. The loop seeds it before every call of `Problems.attempt`, and whatever
    is drawn inside that call goes on from there: so a batch that is computed again after a kill is the same.
    """

    @abstractmethod
    def write(self, conversations: Sequence[list[Message]], context: str | None = None) -> list[Written]:
        """One continuation of each conversation, all in one batch.

        Args:
            conversations: chat messages, the last of which is the user's. Conversations of one call may have different
                lengths; the caller leaves out those that are over.
            context: text that every prompt holds, placed as in distillation (config keys `placement`, `template`): its
                keys and values are computed once for all conversations and calls. None: the prompts hold none.

        Raises:
            UserError: a prompt does not fit into the model's window.
        """


@dataclass(frozen=True)
class Attempt:
    """One try at an item: a line of `attempts.jsonl` or `validation.jsonl`, less what the loop knows itself.

    Attributes:
        item: id of the item.
        transcript: what an extractor of lessons reads: the problem as it was put, and everything that the model wrote
            and was answered, as plain text with headings of the implementation's own. Never the reference answer, nor
            whether the attempt went well: that is `outcome`.
        outcome: feedback in words, such as "The final answer is wrong." or a game's last message. The extractor sees it
            where the config says so (`extract.show_outcome`). None: nothing is known.
        success: whether it went well; None where it cannot be judged. Validation attempts must have one.
        tokens: tokens that the model wrote, over all turns.
        cut_off: whether the limit of tokens ended any of its turns.
        details: what else to keep, as JSON has it (numbers of turns, invalid moves, ...). For readers of the files.
    """

    item: str
    transcript: str
    outcome: str | None
    success: bool | None
    tokens: int
    cut_off: bool
    details: dict[str, Any] = field(default_factory=dict)


class Problems(ABC):
    """Items that can be attempted: a training part that lessons come from, and a validation part that chooses lists.

    In a config it is chosen by `problems.class_path`; the constructor's arguments are `problems.init_args` and their
    docstring lines its help. The constructor checks its arguments and must be cheap: no model is loaded in a subclass.

    An item is known by its id, a text that means the same item in every process (a hash of the problem, a board's
    seed). Equal ids are equal items: the loop refuses an id that is in both parts.

    Every method is called in one process, with no gradient.
    """

    @abstractmethod
    def training(self) -> Sequence[str]:
        """Ids of the training items, each once, in an order that does not change.

        Raises:
            UserError: they cannot be read; names the config key. Comes before a model is loaded.
        """

    @abstractmethod
    def validation(self) -> Sequence[str]:
        """Ids of the validation items, each once, in an order that does not change. Raises as `training` does."""

    @abstractmethod
    def attempt(self, items: Sequence[str], writer: Writer, context: str | None) -> list[Attempt]:
        """One attempt at each item, in their order. The loop passes at most a batch (`solve.batch_size`) at once.

        The result must be a function of the arguments and of torch's default generator alone: an implementation that
        draws from another generator derives its seed from the item.

        Args:
            items: ids of either part; one may come twice.
            writer: who attempts them. Call `writer.write` with the context as it comes.
            context: the lessons so far as one text, or None: the attempt is made without.

        Raises:
            UserError: a prompt does not fit into the model's window.
        """
