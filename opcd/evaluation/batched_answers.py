"""A student's answers to prompts in batches, with or without a context, on one rank or several."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import psutil
import torch
import torch.distributed
from accelerate.utils import find_executable_batch_size

from opcd.data import Example, Views
from opcd.modules.lm.generation import Sampling
from opcd.modules.lm.rows_at_a_time import free_of_gpu, rows_that_fit
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student, respond

Answers = TypeVar("Answers")
MOST_ROWS = 256
"""Most prompts in a batch of the size auto."""


class Answer(str):
    """The text of an answer, with facts that the text does not show.

    Attributes:
        tokens: number of generated tokens, the end-of-sequence token included.
        cut_off: whether the token limit ended the answer.
    """

    tokens: int
    cut_off: bool


@dataclass
class Answering:
    """A student, and how it answers.

    Attributes:
        student: model and tokenizer.
        views: makes prompts of messages.
        context: text in every prompt, or None.
        sampling: how tokens are drawn.
        batch_size: prompts per batch; "auto" estimates what fits, and halves it when memory runs out.
        prefix: the cache of the context's keys and values.
    """

    student: Student
    views: Views
    context: str | None
    sampling: Sampling
    batch_size: int | Literal["auto"]
    prefix: PrefixCache

    def in_batches(self, answer: Callable[..., Answers], longest: int, *args: Any) -> Answers:
        """The value of `answer(batch_size, *args)`; `longest` is the number of tokens of the longest prompt."""
        if self.batch_size != "auto":
            return answer(self.batch_size, *args)
        model = self.student.model
        gpu = model.device.type == "cuda"
        free = free_of_gpu(model.device) if gpu else psutil.virtual_memory().available
        first = min(MOST_ROWS, rows_that_fit(model, longest + self.sampling.max_new_tokens, free))
        found: Answers = find_executable_batch_size(answer, starting_batch_size=first)(*args)
        return found

    def batch(self, prompts: list[list[int]], until: Sequence[str] = ()) -> list[Answer]:
        """The answers to one batch of prompts.

        Args:
            prompts: token ids, the context's included.
            until: stop strings. An answer ends before the first one, and later tokens do not count.
        """
        responses = respond(self.student, self.views, prompts, self.context, self.sampling, self.prefix)
        stops = [stop for stop in until if stop]
        return [self._answer(response.tolist(), stops) for response in responses]

    def _answer(self, ids: list[int], stops: list[str]) -> Answer:
        text = self._text(ids)
        found = [place for stop in stops if (place := text.find(stop)) >= 0]
        answer = Answer(text[: min(found, default=len(text))])
        answer.tokens, answer.cut_off = len(ids), ids[-1] not in self.student.eos_ids
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
    """Token ids of a query with the generation prompt, and with the context unless it is None."""
    example = Example(query, None, None, None, 0, source)
    return views.student_prompt(example) if context is None else views.teacher_prompt(example, context)


def rank_and_ranks() -> tuple[int, int]:
    """This process's rank in its process group, and the number of ranks."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def gather_on(target: int, part: Any) -> list[Any] | None:
    """The objects of all ranks on the rank `target`, None on the others. Every rank must call this."""
    rank, ranks = rank_and_ranks()
    parts = [None] * ranks if rank == target else None
    torch.distributed.gather_object(part, parts, dst=target)
    return parts
