"""The prompts of one task: the text that lm-eval handles, and the token ids for the model."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from opcd.data import Views
from opcd.data.chat_template import TextEncoder
from opcd.data.views import split_template
from opcd.evaluation.batched_answers import prompt_ids
from opcd.runtime.errors import UserError

Chat = list[dict[str, str]]


class Prompts:
    """The prompts of one task.

    With a chat template, text of a row never becomes a control token. Without one, the context precedes the prompt.

    Args:
        views: makes prompts of messages; with `placement: raw`, no chat template is applied.
        tokenizer: the model's tokenizer.
        context: text in every prompt, or None.
        template: joins context and prompt if no chat template is applied.

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
        self.first: int = tokenizer.eos_token_id if begins is None else begins
        """The token that begins a text: BOS, or EOS if the tokenizer has no BOS."""

    def render(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The text of a chat, for lm-eval's `apply_chat_template`.

        Args:
            chat_history: messages.
            add_generation_prompt: False if the last message is the given beginning of the assistant's answer.
        """
        given = "" if add_generation_prompt else chat_history[-1]["content"]
        messages = chat_history if add_generation_prompt else chat_history[:-1]
        ids = [*prompt_ids(self.views, messages, self.context, self.source), *self._text.data(given)]
        text = self.views.context_text(ids)
        self._ids[text] = ids
        return text

    def ids(self, prompt: str) -> list[int]:
        """Token ids of a prompt, the context's included."""
        if prompt not in self._ids:  # `render` stores those of a chat
            assert not self.chat
            empty = not prompt and not self.context
            self._ids[prompt] = [self.first] if empty else prompt_ids(self.views, prompt, self.context)
        return self._ids[prompt]

    def pair(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of its continuation, divided as in lm-eval's HFLM.

        Both are encoded as one text, which is divided after as many tokens as the prompt alone has. White space at the
        end of the prompt belongs to the continuation. An empty prompt is the token that begins a text.

        Raises:
            UserError: the continuation is empty.
        """
        head, tail = self._divided(prompt, continuation)
        if not tail:  # the continuation only extends the last token; lm-eval's HFLM fails here
            head, tail = self.ids(prompt), self._text.data(continuation)
        if not tail:
            raise UserError(f"{self.source}: a text that is scored is empty")
        return head, tail

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text that is scored as a whole, without prompt and context."""
        return self._text.data(text, add_special_tokens=True)

    def _divided(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        if self.chat and prompt:
            head = self._head(prompt)
            if head is None or self._text.holds_control(continuation):
                return self._ids[prompt], self._text.data(continuation)
            return head, self._text.trusted(prompt + continuation)[len(head) :]
        text = prompt
        if self.context is not None and not self.chat:  # an empty prompt of a chat is lm-eval's unconditional question
            fields = {"{context}": self.context, "{query}": prompt}
            text = "".join(fields.get(piece, piece) for piece in self._pieces)
        if not text:
            tail = self._text.data(continuation)
            return ([self.first], tail) if tail[:1] != [self.first] else (tail[:1], tail[1:])
        head = self._text.data(text.rstrip(), add_special_tokens=True)
        tail = self._text.data(text + continuation, add_special_tokens=True)[len(head) :]
        return head or [self.first], tail

    def _head(self, prompt: str) -> list[int] | None:
        """Ids of a chat's text without white space at its end; None if text of a row would become a control token."""
        if prompt not in self._heads:
            same = self._text.trusted(prompt) == self._ids[prompt]
            self._heads[prompt] = self._text.trusted(prompt.rstrip()) if same else None
        return self._heads[prompt]
