"""The two views of an example: the student's prompt, and the teacher's, which also holds the context."""

from functools import lru_cache
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from opcd.data.chat_template import MARK, ChatRenderer, TextEncoder
from opcd.data.example import Example, Message
from opcd.runtime.errors import UserError

Placement = Literal["system", "user", "raw"]
"""Where the teacher's context goes; `ContextQueryDataModule` describes each."""

DEFAULT_TEMPLATE = "{context}\n\n{query}"
PROBES = ("A word.", "\n7")
"""Two queries whose first tokens differ in every vocabulary."""
KEPT_PREFIXES = 256
STUDENT, TEACHER = "model.student", "model.teacher.init_args.model"


class Views:
    """Builds both views as token ids. They end at the same generation prompt, so a response follows the same tokens.

    Args:
        student: the student's tokenizer.
        teacher: the teacher's tokenizer, of the same vocabulary.
        placement: where the teacher's context goes. system: in the system message, before its text if there is one;
            user: before the query, in the last user message; raw: before the query, without a chat template.
        template: joins the two for user and raw; holds {context} and {query} once each. None: "{context}\\n\\n{query}".
        student_kwargs: extra variables of the student's chat template.
        teacher_kwargs: extra variables of the teacher's chat template.
        keys: config keys of the student and the teacher, and the prefix of placement and template, for messages.

    Raises:
        UserError: the template or the chat templates do not fit the placement, or the views end differently.
    """

    def __init__(
        self,
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        placement: Placement = "system",
        template: str | None = None,
        student_kwargs: dict[str, Any] | None = None,
        teacher_kwargs: dict[str, Any] | None = None,
        keys: tuple[str, str, str] = (STUDENT, TEACHER, "data."),
    ) -> None:
        self.placement = placement
        self._keys = keys
        self._template = split_template(template, placement, keys[2])
        self._student_text = TextEncoder(student)
        self._teacher_text = self._student_text if teacher is student else TextEncoder(teacher)
        self._eos = student.eos_token_id
        self._prefixes: dict[str, list[int]] = {}
        self._context_ids = lru_cache(maxsize=16)(self._teacher_text.data)  # many rows have one context
        if placement == "raw":
            for key, kwargs in zip(keys, (student_kwargs, teacher_kwargs), strict=False):
                if kwargs:
                    raise UserError(f"{key}.chat_template_kwargs has no effect with data.placement: raw; remove it")
            return
        raw = ", or data.placement: raw" if keys[2] == "data." else ""
        self._student = ChatRenderer(self._student_text, student_kwargs or {}, keys[0], raw)
        self._teacher = ChatRenderer(self._teacher_text, teacher_kwargs or {}, keys[1], raw)
        question: list[Message] = [{"role": "user", "content": PROBES[0]}]
        self._check_ends(question, question)
        self._check_context_shows()

    def student_prompt(self, example: Example) -> list[int]:
        """Ids of the query and of the generation prompt.

        Raises:
            UserError: the query does not fit the placement or the chat template; the message names its source.
        """
        if self.placement == "raw":
            return self._student_text.data(_raw_query(example), add_special_tokens=True)
        return self._student.encode(_messages(example), example.source)

    def teacher_prompt(self, example: Example, context: str) -> list[int]:
        """Ids of the same prompt with the context.

        Raises:
            UserError: as for `student_prompt`.
        """
        if self.placement == "raw":
            return self._teacher_text.data(self._fill(context, _raw_query(example)), add_special_tokens=True)
        return self._teacher.encode(self._with_context(_messages(example), context), example.source)

    def teacher_prefix(self, context: str) -> list[int]:
        """Ids that teacher prompts with this context begin with, whatever the query.

        They are the common beginning of the prompts of two different queries: the context and what the chat template
        puts before it. A prompt whose own system message follows the context may share fewer of these ids.
        """
        if context not in self._prefixes:
            if len(self._prefixes) >= KEPT_PREFIXES:  # contexts may be as many as rows
                self._prefixes.clear()
            one, other = (self.teacher_prompt(Example(q, None, None, None, 0, "probe"), context) for q in PROBES)
            same = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            self._prefixes[context] = one[: next(same, min(len(one), len(other)))]
        return self._prefixes[context]

    def response_ids(self, text: str) -> list[int]:
        """Ids of a response, then the end-of-sequence token. Special tokens in the text are plain text."""
        # Unlike a prompt, a response may hold added tokens that are not special, such as <think>: models write them.
        encoded = self._student_text.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [*encoded["input_ids"], self._eos]

    @property
    def turn_end(self) -> int | None:
        """The token with which the student's chat template ends an assistant's turn; None without one."""
        return None if self.placement == "raw" else self._student.turn_end

    def context_ids(self, context: str) -> list[int]:
        """Ids of a context's own text, from the teacher's tokenizer."""
        return self._context_ids(context)

    def context_text(self, ids: list[int]) -> str:
        """The text of some of `context_ids`."""
        return self._teacher_text.decode(ids)

    def _with_context(self, messages: list[Message], context: str) -> list[Message]:
        if self.placement == "user":
            return [*messages[:-1], {**messages[-1], "content": self._fill(context, messages[-1]["content"])}]
        if messages[0]["role"] == "system":
            return [{"role": "system", "content": f"{context}\n\n{messages[0]['content']}"}, *messages[1:]]
        return [{"role": "system", "content": context}, *messages]

    def _fill(self, context: str, query: str) -> str:
        return "".join({"{context}": context, "{query}": query}.get(piece, piece) for piece in self._template)

    def check_row(self, example: Example) -> None:
        """Check that prompts can be made of a row, with a context and without.

        Raises:
            UserError: the query does not fit the placement or a chat template, or the views end differently.
        """
        if self.placement == "raw":
            _raw_query(example)
            return
        messages = _messages(example)
        try:
            self._check_ends(messages, self._with_context(messages, PROBES[0]))
        except UserError as error:
            raise UserError(f"{example.source}: {error}") from error
        if any(text.holds_control(m["content"]) for text in (self._student_text, self._teacher_text) for m in messages):
            self.student_prompt(example)
            self.teacher_prompt(example, PROBES[0])

    def check_context(self, context: str, source: str) -> None:
        """Check that a context does not change how the teacher's prompts end (as `/no_think` does).

        Raises:
            UserError: shows both ends.
        """
        if self.placement == "raw":
            return
        question: list[Message] = [{"role": "user", "content": PROBES[0]}]
        try:
            self._check_ends(question, self._with_context(question, context))
        except UserError as error:
            raise UserError(f"{source}: {error}") from error

    def _check_ends(self, student: list[Message], teacher: list[Message]) -> None:
        """Check that both chat templates write the same after the last message, where the response follows."""
        ends = [
            view.text.trusted(view.render(_marked(messages)).rpartition(MARK.format(0))[2])
            for view, messages in ((self._student, student), (self._teacher, teacher))
        ]
        if ends[0] != ends[1]:
            switched = student != teacher and self._ends_alike(student)
            cause = (
                "the context changes the chat template's end (as /no_think does); remove that text from the context, "
                "or set it for both models in chat_template_kwargs"
                if switched
                else f"make {self._keys[0]}.chat_template_kwargs and {self._keys[1]}.chat_template_kwargs agree (or "
                "the chat templates)"
            )
            raise UserError(
                "both views must end at the same generation prompt; the student's ends with "
                f"{self._student_text.decode(ends[0])!r}, the teacher's with {self._teacher_text.decode(ends[1])!r}: "
                f"{cause}"
            )

    def _ends_alike(self, messages: list[Message]) -> bool:
        """Whether both models' prompts of the same messages have the same end."""
        try:
            self._check_ends(messages, messages)
        except UserError:
            return False
        return True

    def _check_context_shows(self) -> None:
        context, query = MARK.format(1), MARK.format(2)
        why = "it drops the context"
        try:
            text = self._teacher.render(self._with_context([{"role": "user", "content": query}], context))
            if context in text and query in text:
                return
        except UserError as error:
            why = str(error)
        key = f"{self._keys[2]}placement"
        hint = f"; use {key}: user" if self.placement == "system" else ""
        name = self._teacher.tokenizer.name_or_path
        raise UserError(f"{key}: {self.placement}: {name} does not take a context there: {why}{hint}")


def split_template(template: str | None, placement: Placement, key: str = "data.") -> list[str]:
    """The template (None: the default), split at its two fields. str.format would fail on braces in the data.

    Raises:
        UserError: a field is missing or repeated, or the placement uses no template.
    """
    if template is not None and placement == "system":
        raise UserError(f"{key}template has no effect with {key}placement: system; remove it, or use placement user")
    text = DEFAULT_TEMPLATE if template is None else template
    if text.count("{context}") != 1 or text.count("{query}") != 1:
        raise UserError(f"{key}template must contain {{context}} and {{query}} once each; it is {text!r}")
    return [piece for half in text.partition("{context}") for piece in half.partition("{query}")]


def _messages(example: Example) -> list[Message]:
    query = example.query
    return [{"role": "user", "content": query}] if isinstance(query, str) else query


def _marked(messages: list[Message]) -> list[Message]:
    """The messages with a mark after the last one's content."""
    return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + MARK.format(0)}]


def _raw_query(example: Example) -> str:
    if not isinstance(example.query, str):
        raise UserError(f"{example.source}: with data.placement: raw the query must be text, not chat messages")
    return example.query
