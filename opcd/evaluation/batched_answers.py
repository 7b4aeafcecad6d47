"""Answers of a student to prompts, in batches, with or without a context in them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from accelerate.utils import find_executable_batch_size

from opcd.data import Example, Views
from opcd.evaluation.batches import rows_that_fit
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student, respond

Answers = TypeVar("Answers")


class Answer(str):
    """An answer's text, with what the text does not show.

    Attributes:
        tokens: tokens that were generated, the end-of-sequence token included.
        cut_off: whether the limit ended it.
    """

    tokens: int
    cut_off: bool


@dataclass
class Answering:
    """Who answers, and how.

    Attributes:
        student: model and tokenizer.
        views: what makes prompts of messages.
        context: text that stands in every prompt, or None.
        sampling: how tokens are drawn.
        batch_size: prompts at once; "auto" takes what fits, and halves it when memory runs out all the same.
        prefix: what keeps the keys and values of the context.
    """

    student: Student
    views: Views
    context: str | None
    sampling: Sampling
    batch_size: int | Literal["auto"]
    prefix: PrefixCache

    def in_batches(self, answer: Callable[..., Answers], longest: int, *args: Any) -> Answers:
        """What `answer(batch_size, *args)` gives; `longest` is the number of tokens of the longest prompt."""
        if self.batch_size != "auto":
            return answer(self.batch_size, *args)
        first = rows_that_fit(self.student.model, longest + self.sampling.max_new_tokens)
        found: Answers = find_executable_batch_size(answer, starting_batch_size=first)(*args)
        return found

    def batch(self, prompts: list[list[int]], until: Sequence[str] = ()) -> list[Answer]:
        """An answer to each prompt of token ids, all at once.

        Args:
            prompts: token ids, the context's included.
            until: texts before which an answer ends. Tokens after the first of them do not count.
        """
        responses = respond(self.student, self.views, prompts, self.context, self.sampling, self.prefix)
        stops = [stop for stop in until if stop]
        return [self._answer(response.tolist(), self.student.eos_ids, stops) for response in responses]

    def _answer(self, ids: list[int], ends: set[int], stops: list[str]) -> Answer:
        text = self._text(ids)
        found = [place for stop in stops if (place := text.find(stop)) >= 0]
        answer = Answer(text[: min(found, default=len(text))])
        answer.tokens, answer.cut_off = len(ids), ids[-1] not in ends
        if found:
            counts = range(1, len(ids) + 1)
            enough = bisect_left(counts, True, key=lambda n: any(stop in self._text(ids[:n]) for stop in stops))
            answer.tokens, answer.cut_off = enough + 1, False
        return answer

    def _text(self, ids: list[int]) -> str:
        return str(self.student.tokenizer.decode(ids, skip_special_tokens=True))


def prompt_ids(
    views: Views, query: str | list[dict[str, str]], context: str | None, source: str = "a row"
) -> list[int]:
    """Token ids of a query and the generation prompt, with the context where there is one."""
    example = Example(query, None, None, None, 0, source)
    return views.student_prompt(example) if context is None else views.teacher_prompt(example, context)
