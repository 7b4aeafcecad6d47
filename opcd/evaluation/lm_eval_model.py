"""A model as lm-eval sees it: chat messages in, answers out, generated as in training and in `opcd predict`.

Not lm-eval's own HFLM: that one switches a live model to eval mode for good and ties its weights anew, merges the
model's generation config into the settings, and says neither how long an answer was nor whether it was cut off.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator, postprocess_generated_text

from opcd.evaluation.batched_answers import Answer, Answering, prompt_ids


class AnsweringModel(LM):  # type: ignore[misc]
    """Answers of a student to what lm-eval asks.

    `seed` seeds torch's generator before the first answer; every rank should have another.

    Args:
        answering: the student, its context, and how it answers.
        show: called with each number of answers that are done.
    """

    def __init__(self, answering: Answering, show: Callable[[int], None]) -> None:
        super().__init__()
        self.answering, self.show = answering, show
        self.seed = 0
        self._device = answering.student.model.device
        self._ids: dict[str, list[int]] = {}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt as text. Its ids are kept: in them, what data says is no control token."""
        assert add_generation_prompt, "a task whose answers begin with a given prefix is not among ours"
        views = self.answering.views
        ids = prompt_ids(views, chat_history, self.answering.context)
        text = views.context_text(ids)
        self._ids[text] = ids
        return text

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer for lm-eval's cache of requests, which is not used."""
        return str(self.answering.student.tokenizer.name_or_path)

    def generate_until(self, requests: list[Instance]) -> list[Answer]:
        """An Answer to each request."""
        longest = max(len(self._ids[request.args[0]]) for request in requests)
        return self.answering.in_batches(self._answers, longest, requests)

    def _answers(self, batch_size: int, requests: list[Instance]) -> list[Answer]:
        torch.manual_seed(self.seed)
        # As lm-eval's HFLM orders them: the longest prompts first, so that batches hold the same rows as there.
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self._ids[args[0]]), args[0]),
            group_fn=lambda args: args[1],
            group_by="gen_kwargs",
        )
        answers: list[Answer] = []
        for chunk in order.get_batched(n=batch_size):
            texts, settings = zip(*chunk, strict=True)
            until = settings[0].get("until")
            found = self.answering.batch([self._ids[text] for text in texts])
            answers += [answer.with_text(postprocess_generated_text(answer, until, None)) for answer in found]
            self.show(len(texts))
        return list(order.get_original(answers))

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
