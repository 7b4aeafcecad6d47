"""A model on this machine that continues conversations."""

from collections.abc import Sequence

from opcd.data import Views
from opcd.data.example import Message
from opcd.evaluation.batched_answers import prompt_ids
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student, respond
from opcd.runtime.errors import UserError
from opcd.writing.writer import Writer, Written


class ModelWriter(Writer):
    """A model on this machine.

    Args:
        student: the model and its tokenizer.
        views: renders conversations as prompts.
        sampling: how tokens are drawn.
        window: most tokens of prompt and answer together; None: not known.
        name: config key and name of the model, for messages.
        advice: what to do where a prompt does not fit the window, for messages.
    """

    def __init__(
        self, student: Student, views: Views, sampling: Sampling, window: int | None, name: str, advice: str
    ) -> None:
        self.student, self.views, self.sampling = student, views, sampling
        self.window, self.name, self.advice = window, name, advice
        self._prefix = PrefixCache()
        self._context: str | None = None

    def write(self, conversations: Sequence[list[Message]], context: str | None = None) -> list[Written]:
        """One continuation of each conversation, all in one batch."""
        if context != self._context:
            self._prefix.clear()  # one context serves many calls before the next one
            self._context = context
        prompts = [self._prompt(messages, context) for messages in conversations]
        responses = respond(self.student, self.views, prompts, context, self.sampling, self._prefix)
        return [self._written(response.tolist()) for response in responses]

    def _prompt(self, messages: list[Message], context: str | None) -> list[int]:
        ids = prompt_ids(self.views, messages, context, "a conversation")
        most = self.sampling.max_new_tokens
        if self.window is not None and len(ids) + most > self.window:
            raise UserError(
                f"{self.name} takes {self.window} tokens, but a prompt has {len(ids)} and up to {most} are added: "
                f"{self.advice}; the prompt begins with {messages[-1]['content'][:80]!r}"
            )
        return ids

    def _written(self, ids: list[int]) -> Written:
        text = str(self.student.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        return Written(text, len(ids), ids[-1] not in self.student.eos_ids)
