"""A model as lm-eval sees it: chat messages in, answers out, generated as in training and in `opcd predict`.

Not lm-eval's own HFLM: that one switches a live model to eval mode for good and ties its weights anew, merges the
model's generation config into the settings, and says neither how long an answer was nor whether it was cut off.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from accelerate.utils import find_executable_batch_size
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator, postprocess_generated_text

from opcd.data import Example, Views
from opcd.evaluation.batches import rows_that_fit
from opcd.modules.answering import respond
from opcd.modules.generation import Sampling
from opcd.modules.prefix import SharedPrefix
from opcd.modules.student import Student


class Answer(str):
    """An answer's text, with what the text does not show.

    Attributes:
        tokens: tokens that were generated, the end-of-sequence token included.
        cut_off: whether the limit ended it.
    """

    tokens: int
    cut_off: bool


class AnsweringModel(LM):  # type: ignore[misc]
    """Answers of a student, with or without a context in its prompt.

    `seed` seeds torch's generator before the first answer; every rank should have another.

    Args:
        student: model and tokenizer.
        views: what makes prompts of messages.
        context: text that stands in every prompt, or None.
        sampling: how tokens are drawn.
        batch_size: prompts at once; "auto" takes what fits, and halves it when memory runs out all the same.
        prefix: what keeps the keys and values of the context.
        show: called with each number of answers that are done.
    """

    def __init__(
        self,
        student: Student,
        views: Views,
        context: str | None,
        sampling: Sampling,
        batch_size: int | str,
        prefix: SharedPrefix,
        show: Callable[[int], None],
    ) -> None:
        super().__init__()
        self.student, self.views, self.context, self.sampling = student, views, context, sampling
        self.batch_size, self.prefix, self.show = batch_size, prefix, show
        self.seed = 0
        self._device = student.model.device
        self._ids: dict[str, list[int]] = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Its ids are kept: in them, what data says is no control token."""
        assert add_generation_prompt, "a task whose answers begin with a given prefix is not among ours"
        ids = prompt_ids(self.views, chat_history, self.context)
        text = self.views.context_text(ids)
        self._ids[text] = ids
        return text

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer for lm-eval's cache of requests, which is not used."""
        return str(self.student.tokenizer.name_or_path)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An Answer to each request."""
        if self.batch_size != "auto":
            return self._answers(int(self.batch_size), requests)
        longest = max(len(self._ids[request.args[0]]) for request in requests) + self.sampling.max_new_tokens
        first = rows_that_fit(self.student.model, longest)
        return list(find_executable_batch_size(self._answers, starting_batch_size=first)(requests))

    def _answers(self, batch_size: int, requests: list[Instance]) -> list[str]:
        torch.manual_seed(self.seed)
        # As lm-eval's HFLM orders them: the longest prompts first, so that batches hold the same rows as there.
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self._ids[args[0]]), args[0]),
            group_fn=lambda args: args[1],
            group_by="gen_kwargs",
        )
        answers: list[str] = []
        for chunk in order.get_batched(n=batch_size):
            texts, settings = zip(*chunk, strict=True)
            answers += self._batch([self._ids[text] for text in texts], settings[0].get("until"))
            self.show(len(texts))
        return list(order.get_original(answers))

    def _batch(self, ids: list[list[int]], until: list[str] | None) -> list[Answer]:
        responses = respond(self.student, self.views, ids, self.context, self.sampling, self.prefix)
        ends = self.student.eos_ids
        return [self._answer(response.tolist(), ends, until) for response in responses]

    def _answer(self, ids: list[int], ends: set[int], until: list[str] | None) -> Answer:
        text = str(self.student.tokenizer.decode(ids, skip_special_tokens=True))
        answer = Answer(postprocess_generated_text(text, until, None))
        answer.tokens, answer.cut_off = len(ids), ids[-1] not in ends
        return answer

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """A number of each rank, in their order."""
        if self._world_size == 1:
            return tensor
        parts = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of each rank on rank `dst`, None elsewhere."""
        if self._world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        """Wait for the other ranks."""
        if self._world_size > 1:
            torch.distributed.barrier()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """No task here asks for it."""
        raise NotImplementedError("only tasks that generate are evaluated")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """No task here asks for it."""
        raise NotImplementedError("only tasks that generate are evaluated")


def prompt_ids(views: Views, messages: list[dict[str, str]], context: str | None, source: str = "a row") -> list[int]:
    """Token ids of messages and generation prompt, with the context where there is one."""
    example = Example(messages, None, None, None, 0, source)
    return views.student_prompt(example) if context is None else views.teacher_prompt(example, context)
