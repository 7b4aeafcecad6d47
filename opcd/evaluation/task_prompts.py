"""The prompts of one task, as the text that lm-eval handles and as the token ids that the model is given."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opcd.data import Views
from opcd.data.chat_template import TextEncoder
from opcd.data.views import split_template
from opcd.evaluation.batched_answers import prompt_ids
from opcd.runtime.errors import UserError

Chat = list[dict[str, str]]


class Prompts:
    """Makes the prompts of one task.

    With a chat template, text of a row that spells a control token stays text. Without one, the context stands before
    the prompt.

    Args:
        views: what makes prompts of messages; with `placement: raw` where no chat template is applied.
        tokenizer: the model's.
        context: text that stands in every prompt, or None.
        template: joins context and prompt where no chat template is applied.

    Attributes:
        chat: whether the chat template is applied.
        source: the row whose prompts are made, for messages.
    """

    def __init__(
        self, views: Views, tokenizer: PreTrainedTokenizerBase, context: str | None, template: str | None
    ) -> None:
        self.views, self.context, self.chat = views, context, views.placement != "raw"
        self.source = "a row"
        self._pieces = split_template(template, "user")
        self._text = TextEncoder(tokenizer)
        self._ids: dict[str, list[int]] = {}
        self._heads: dict[str, list[int] | None] = {}
        begins = tokenizer.bos_token_id
        self._first: int = tokenizer.eos_token_id if begins is None else begins

    def render(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The text of a chat: what lm-eval calls `apply_chat_template`.

        Args:
            chat_history: messages; the last one is the assistant's where its answer begins with a given text.
            add_generation_prompt: False where that is so.
        """
        given = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        ids = [*prompt_ids(self.views, messages, self.context, self.source), *self._text.data(given)]
        text = self.views.context_text(ids)
        self._ids[text] = ids
        return text

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, the context's included."""
        if prompt not in self._ids:  # no chat: those are rendered, and their ids kept
            assert not self.chat
            whole = bool(prompt or self.context)
            self._ids[prompt] = prompt_ids(self.views, prompt, self.context) if whole else [self._first]
        return self._ids[prompt]

    def pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of a text that follows it, divided as lm-eval's HFLM does.

        Both are encoded as one text and divided after the tokens that the prompt alone has; white space at its end
        goes to the continuation. An empty prompt is the token that begins a text.

        Raises:
            UserError: the continuation is empty.
        """
        head, tail = self._divided(prompt, continuation)
        if not tail:  # both together have no more tokens than the prompt; lm-eval's HFLM fails here
            head, tail = self.ids(prompt), self._text.data(continuation)
        if not tail:
            raise UserError(f"{self.source}: a text that is scored is empty")
        return head, tail

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is scored whole, without prompt and context."""
        return self._text.data(text, add_special_tokens=True)

    @property
    def first(self) -> int:
        """The token that begins a text: BOS, or EOS where the tokenizer has none."""
        return self._first

    def _divided(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.chat and prompt:
            head = self._head(prompt)
            if head is None or self._text.holds_control(continuation):
                return self._ids[prompt], self._text.data(continuation)
            return head, self._text.trusted(prompt + continuation)[len(head) :]
        whole = self._with_context(prompt)
        if not whole:
            tail = self._text.data(continuation)
            return ([self._first], tail) if tail[:1] != [self._first] else (tail[:1], tail[1:])
        head = self._text.data(whole.rstrip(), add_special_tokens=True)
        tail = self._text.data(whole + continuation, add_special_tokens=True)[len(head) :]
        return head or [self._first], tail

    def _head(self, prompt: str) -> list[int] | None:
        """Ids of a chat's text without white space at its end; None where they would hold a control token that a row
        spells."""
        if prompt not in self._heads:
            same = self._text.trusted(prompt) == self._ids[prompt]
            self._heads[prompt] = self._text.trusted(prompt.rstrip()) if same else None
        return self._heads[prompt]

    def _with_context(self, prompt: str) -> str:
        """The prompt as one text; in a chat an empty one has no context: what lm-eval asks then is unconditional."""
        if self.context is None or self.chat:
            return prompt
        fields = {"{context}": self.context, "{query}": prompt}
        return "".join(fields.get(piece, piece) for piece in self._pieces)
