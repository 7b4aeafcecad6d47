"""Chat messages as the token ids of a tokenizer's chat template."""

import re
from collections.abc import Iterator
from typing import Any

import jinja2

from opcd.data.example import Message
from opcd.data.safe_tokenizer import TextEncoder
from opcd.runtime.errors import UserError

# Private-use characters: a template passes them on untouched, and no template holds them.
MARK = "\ue000{}\ue001"
MARKS = re.compile("\ue000([0-9]+)\ue001")
PROBES = {
    "user": ["user"],
    "system": ["system", "user"],
    "assistant": ["user", "assistant", "user"],
    "tool": ["user", "assistant", "tool", "user"],
}
"""The roles of a conversation in which each role occurs."""


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
        self._parts: set[str] = set()
        for role in PROBES:
            if self._wants_parts(role):
                self._parts.add(role)

    def _wants_parts(self, role: str) -> bool:
        """Whether a message of the role shows only where its content is a list of parts (`{"type": "text"}`)."""
        roles = PROBES[role]
        place = max(0, len(roles) - 2)
        messages = [{"role": of, "content": MARK.format(number)} for number, of in enumerate(roles)]

        def shows(parts: set[str]) -> bool:
            """Whether the message is in the template's text."""
            try:
                return MARK.format(place) in self._rendered(messages, parts)
            except Exception:  # the template's own; it is told when a row is rendered
                return False

        return not shows(self._parts) and shows(self._parts | {role})

    def _rendered(self, messages: list[Message], parts: set[str]) -> str:
        """The template's text; messages of the roles in `parts` have a list of parts in the place of their text."""
        options = {**self.template_kwargs, "tokenize": False, "add_generation_prompt": True}
        given: list[dict[str, Any]] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message["role"] in parts
            else dict(message)
            for message in messages
        ]
        return str(self.tokenizer.apply_chat_template(given, **options))

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
        try:
            return self._rendered(messages, self._parts)
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
        pieces = MARKS.split(marked)
        for number, piece in enumerate(pieces):
            is_data = number % 2 == 1
            following = pieces[number + 1] if is_data else ""
            spans = self._spans(messages[int(piece)]["content"]) if is_data else [piece]
            span = next((span for span in spans if rest.startswith(span + following)), None)
            if span is None:
                raise UserError("the chat template rewrites these messages; remove the control tokens from them")
            ids += self.text.data(span) if is_data else self.text.trusted(span)
            rest = rest.removeprefix(span)
        # Some tokenizers put a space before everything that they encode: pieces then say more than the whole.
        if rest or self.text.decode(ids) != self.text.decode(self.text.trusted(text)):
            raise UserError("the tokenizer cannot encode these messages in pieces; remove the control tokens from them")
        return ids

    def _spans(self, content: str) -> Iterator[str]:
        """What a template may make of a content: all of it, or what is left without thoughts or before a control token.

        Templates leave the thoughts out of earlier turns: `content.split('</think>')[-1]`.
        """
        ends = [control for control in self.text.controls if control in content]
        cut = [content, _without_blocks(content, ends), *(content.rsplit(end, 1)[1] for end in ends)]
        cut += [content.split(end, 1)[0] for end in ends]
        for text in dict.fromkeys(cut):
            yield from dict.fromkeys((text, text.strip(), text.lstrip("\n"), text.strip("\n"), text.rstrip()))


def _without_blocks(content: str, controls: list[str]) -> str:
    """The content without what stands between `<NAME>` and `</NAME>`, the two included, where both are controls."""
    for end in controls:
        begin = end.replace("</", "<", 1)
        if begin != end and begin in controls:
            first, *others = content.split(begin)
            content = first + "".join(o.split(end, 1)[1] if end in o else begin + o for o in others)
    return content
