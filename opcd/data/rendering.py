"""Chat messages as the token ids of a tokenizer's chat template."""

import re
from typing import Any

import jinja2

from opcd.data.examples import Message
from opcd.data.literal import TextEncoder
from opcd.errors import UserError

# Private-use characters: a template passes them on untouched, and no template holds them.
MARK = "\ue000{}\ue001"
MARKS = re.compile("\ue000([0-9]+)\ue001")


class ChatRenderer:
    """Applies one model's chat template, up to the prompt of the answer that is to be generated.

    Args:
        text: the encoder of the model's tokenizer.
        template_kwargs: extra variables of the template.
        key: config key of the model (`model.student`), for messages.
        otherwise: what else helps where there is no chat template, for messages.

    Raises:
        UserError: there is no chat template, or it never reads one of `template_kwargs`.
    """

    def __init__(self, text: TextEncoder, template_kwargs: dict[str, Any], key: str, otherwise: str = "") -> None:
        self.text = text
        self.tokenizer = text.tokenizer
        self.template_kwargs, self.key = template_kwargs, key
        self._check(key, otherwise)

    def _check(self, key: str, otherwise: str) -> None:
        template = self.tokenizer.chat_template
        if not template:
            raise UserError(
                f"{key}: the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                f"set {key}.chat_template{otherwise}"
            )
        for name in self.template_kwargs:
            if name not in str(template):
                raise UserError(f"{key}.chat_template_kwargs: the chat template never reads {name!r}; remove it")

    def render(self, messages: list[Message]) -> str:
        """The text of the messages and of the generation prompt.

        Raises:
            UserError: the template refuses the messages.
        """
        options = {**self.template_kwargs, "tokenize": False, "add_generation_prompt": True}
        try:
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template refuses these messages: {error}") from error
        except Exception as error:  # a template is a program: it may divide by zero
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template fails: {reason}; mend it, or set {self.key}.chat_template") from error

    def encode(self, messages: list[Message], source: str) -> list[int]:
        """Ids of the messages and of the generation prompt; what the messages say never becomes a control token.

        Args:
            messages: chat messages.
            source: where they were read, for messages.

        Raises:
            UserError: the template refuses the messages, or they hold control tokens that cannot be told from its own.
        """
        try:
            text = self.render(messages)
            if not any(self.text.holds_control(message["content"]) for message in messages):
                return self.text.trusted(text)
            return self._splice(messages, text)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def _splice(self, messages: list[Message], text: str) -> list[int]:
        """Ids of the template's own pieces and, between them, of the data, each encoded on its own."""
        marked = self.render([{**message, "content": MARK.format(i)} for i, message in enumerate(messages)])
        ids: list[int] = []
        rest = text
        for number, piece in enumerate(MARKS.split(marked)):
            is_data = number % 2 == 1
            span = _span(messages[int(piece)]["content"], rest) if is_data else piece
            if not rest.startswith(span):
                raise UserError("the chat template rewrites these messages; remove the control tokens from them")
            ids += self.text.data(span) if is_data else self.text.trusted(span)
            rest = rest.removeprefix(span)
        # Some tokenizers put a space before everything that they encode: pieces then say more than the whole.
        if rest or self.text.decode(ids) != self.text.decode(self.text.trusted(text)):
            raise UserError("the tokenizer cannot encode these messages in pieces; remove the control tokens from them")
        return ids


def _span(content: str, rest: str) -> str:
    """What a template made of `content`, at the start of `rest`: the content itself, or the content trimmed."""
    return content if rest.startswith(content) else content.strip()
