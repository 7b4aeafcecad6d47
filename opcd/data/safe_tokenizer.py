"""Text as token ids of which none is a control token, whatever the text says.

A context that contains `<|im_end|>` would close the turn that it stands in.
"""

import copy

from transformers import AddedToken, PreTrainedTokenizerBase

from opcd.runtime.errors import UserError


class TextEncoder:
    """Encodes trusted text (a chat template's) with its control tokens, and data without.

    Control tokens are the special tokens of the tokenizer, and those that were added as plain text (`<think>`,
    `<tool_call>`), but for added white space (Gemma's runs of line breaks).

    Attributes:
        controls: how they are spelled.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        added: dict[int, AddedToken] = tokenizer.added_tokens_decoder
        controls = {number: token for number, token in added.items() if token.content.strip(" \n\t\r▁")}
        self.tokenizer = tokenizer
        self.controls = [token.content for token in controls.values()]
        self._ids = controls.keys()
        self._data_tokenizer = _all_special(tokenizer, list(controls.values()))

    def holds_control(self, text: str) -> bool:
        """Whether `text` spells a control token."""
        return any(control in text for control in self.controls)

    def trusted(self, text: str) -> list[int]:
        """Ids of `text`, its control tokens parsed; nothing is added."""
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
        if not add_special_tokens:
            return plain
        return list(self._data_tokenizer(text, **options)["input_ids"])

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, control tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _all_special(tokenizer: PreTrainedTokenizerBase, controls: list[AddedToken]) -> PreTrainedTokenizerBase:
    """The tokenizer, or a copy where every control token is special: `split_special_tokens` splits only those."""
    plain = [token.content for token in controls if not token.special]
    if not plain:
        return tokenizer
    tokenizer = copy.deepcopy(tokenizer)
    special = [AddedToken(content, special=True, normalized=False) for content in plain]
    tokenizer.add_tokens(special, special_tokens=True)
    return tokenizer
