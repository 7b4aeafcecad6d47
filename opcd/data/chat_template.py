"""Text and chat messages as token ids, such that text from data never becomes a control token.

A context that contains `<|im_end|>` would otherwise close its own turn.
"""

import copy
import re
from collections.abc import Iterator
from typing import Any

import jinja2
from transformers import AddedToken, PreTrainedTokenizerBase

from opcd.data.example import Message
from opcd.runtime.errors import UserError

# Private-use characters: templates copy them unchanged, and no template contains them.
MARK = "\ue000{}\ue001"
MARKS = re.compile("\ue000([0-9]+)\ue001")
PROBES = {
    "user": ["user"],
    "system": ["system", "user"],
    "assistant": ["user", "assistant", "user"],
    "tool": ["user", "assistant", "tool", "user"],
}
"""For each role, the roles of a conversation in which it occurs."""


class TextEncoder:
    """Encodes trusted text (a chat template's) with its control tokens, and data without.

    Control tokens are the tokenizer's special tokens and the tokens that were added as plain text (`<think>`,
    `<tool_call>`), except added white space (Gemma's runs of line breaks).

    Attributes:
        controls: the texts of the control tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        controls = {number: token for number, token in added.items() if token.content.strip(" \n\t\r▁")}
        self.tokenizer = self._data_tokenizer = tokenizer
        self.controls = [token.content for token in controls.values()]
        self._ids = controls.keys()
        if plain := [token.content for token in controls.values() if not token.special]:
            # `split_special_tokens` splits special tokens only: in this copy every control token is special.
            self._data_tokenizer = copy.deepcopy(tokenizer)
            special = [AddedToken(content, special=True, normalized=False) for content in plain]
            self._data_tokenizer.add_tokens(special, special_tokens=True)

    def holds_control(self, text: str) -> bool:
        """Whether `text` contains the text of a control token."""
        return any(control in text for control in self.controls)

    def trusted(self, text: str) -> list[int]:
        """Ids of `text` with its control tokens parsed; nothing is added."""
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def data(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of `text`, in which control tokens are plain text.

        Args:
            text: any text.
            add_special_tokens: put the tokenizer's usual tokens (BOS) around it.

        Raises:
            UserError: this tokenizer cannot take a control token as plain text.
        """
        options = {"split_special_tokens": True, "verbose": False}
        plain = list(self._data_tokenizer(text, add_special_tokens=False, **options)["input_ids"])
        if self.holds_control(text) and not self._ids.isdisjoint(plain):
            raise UserError(
                f"the tokenizer cannot take its control tokens as plain text; remove them from {text[:80]!r}"
            )
        return list(self._data_tokenizer(text, **options)["input_ids"]) if add_special_tokens else plain

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class ChatRenderer:
    """Applies one model's chat template, up to the generation prompt.

    Args:
        text: the encoder of the model's tokenizer.
        template_kwargs: extra variables of the template.
        key: config key of the model (`model.student`), for messages.
        otherwise: an alternative to a chat template, for the message where there is none.

    Raises:
        UserError: there is no chat template, or it never reads one of `template_kwargs`.
    """

    def __init__(self, text: TextEncoder, template_kwargs: dict[str, Any], key: str, otherwise: str = "") -> None:
        self.text = text
        self.tokenizer = text.tokenizer
        self.template_kwargs, self.key = template_kwargs, key
        if not (template := self.tokenizer.chat_template):
            raise UserError(
                f"{key}: the tokenizer of {self.tokenizer.name_or_path} has no chat template; "
                f"set {key}.chat_template{otherwise}"
            )
        for name in template_kwargs:
            if name not in str(template):
                raise UserError(f"{key}.chat_template_kwargs: the chat template never reads {name!r}; remove it")
        self._parts: set[str] = set()
        for role in PROBES:
            if not self._shows(role, self._parts) and self._shows(role, self._parts | {role}):
                self._parts.add(role)

    def _shows(self, role: str, parts: set[str]) -> bool:
        """Whether the template shows a message of the role, if the roles in `parts` have a list of parts as content."""
        roles = PROBES[role]
        messages = [{"role": name, "content": MARK.format(number)} for number, name in enumerate(roles)]
        try:
            return MARK.format(max(0, len(roles) - 2)) in self._rendered(messages, parts)
        except Exception:  # the template's own; reported when a row is rendered
            return False

    def _rendered(self, messages: list[Message], parts: set[str]) -> str:
        """The template's text; the content of roles in `parts` is a list of parts (`{"type": "text"}`)."""
        options = {**self.template_kwargs, "tokenize": False, "add_generation_prompt": True}
        given: list[dict[str, Any]] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message["role"] in parts
            else dict(message)
            for message in messages
        ]
        return str(self.tokenizer.apply_chat_template(given, **options))

    def render(self, messages: list[Message]) -> str:
        """The text of the messages and of the generation prompt.

        Raises:
            UserError: the template raises an error.
        """
        try:
            return self._rendered(messages, self._parts)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template rejects these messages: {error}") from error
        except Exception as error:  # a template is a program: it may divide by zero
            reason = f"{type(error).__name__}: {error}"
            raise UserError(f"the chat template fails: {reason}; fix it, or set {self.key}.chat_template") from error

    @property
    def turn_end(self) -> int | None:
        """The id of the control token with which the template ends an assistant's turn; None if it writes none."""
        messages: list[Message] = [{"role": role, "content": MARK.format(role)} for role in ("user", "assistant")]
        try:
            written = self._rendered(messages, self._parts).rpartition(MARK.format("assistant"))[2].lstrip()
        except Exception:  # the template's own, as in `_shows`
            return None
        first = next((control for control in self.text.controls if written.startswith(control)), None)
        return None if first is None else self.text.trusted(first)[0]

    def encode(self, messages: list[Message], source: str) -> list[int]:
        """Ids of the messages and of the generation prompt; text of the messages never becomes a control token.

        Args:
            messages: chat messages.
            source: where they were read, for messages.

        Raises:
            UserError: the template raises an error, or the messages hold control tokens that cannot be distinguished
                from the template's own.
        """
        try:
            text = self.render(messages)
            if not any(self.text.holds_control(message["content"]) for message in messages):
                return self.text.trusted(text)
            return self._splice(messages, text)
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def _splice(self, messages: list[Message], text: str) -> list[int]:
        """Ids of the template's pieces and of the data between them, each encoded separately."""
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
        # Some tokenizers put a space before everything that they encode: the pieces then have more than the full text.
        if rest or self.text.decode(ids) != self.text.decode(self.text.trusted(text)):
            raise UserError("the tokenizer cannot encode these messages in pieces; remove the control tokens from them")
        return ids

    def _spans(self, content: str) -> Iterator[str]:
        """Yield what a template may keep of a content: all, all but the thoughts, or a part beside a control token.

        Templates remove the thoughts of earlier turns: `content.split('</think>')[-1]`.
        """
        ends = [control for control in self.text.controls if control in content]
        cut = [content, _without_blocks(content, ends), *(content.rsplit(end, 1)[1] for end in ends)]
        cut += [content.split(end, 1)[0] for end in ends]
        for text in dict.fromkeys(cut):
            yield from dict.fromkeys((text, text.strip(), text.lstrip("\n"), text.strip("\n"), text.rstrip()))


def _without_blocks(content: str, controls: list[str]) -> str:
    """The content without each block from `<NAME>` to `</NAME>`, if both are control tokens."""
    for end in controls:
        begin = end.replace("</", "<", 1)
        if begin != end and begin in controls:
            first, *others = content.split(begin)
            content = first + "".join(o.split(end, 1)[1] if end in o else begin + o for o in others)
    return content
