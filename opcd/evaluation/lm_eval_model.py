"""A model as lm-eval sees it: prompts in, answers (generated as in training and `opcd predict`) or log-likelihoods out.

Not lm-eval's own HFLM: that one switches a live model to eval mode for good and ties its weights anew, merges the
model's generation config into the settings, and says neither how long an answer was nor whether it was cut off.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from opcd.evaluation.batched_answers import Answer, Answering
from opcd.evaluation.log_likelihoods import LogLikelihood, Pair, log_likelihoods
from opcd.evaluation.task_prompts import Chat, Prompts


class AnsweringModel(LM):  # type: ignore[misc]
    """Answers of a student to what lm-eval asks.

    `seed` seeds torch's generator before the first answer; every rank should have another.

    Args:
        answering: the student, its context, and how it answers.
        prompts: those of the task.
        window: most tokens that the model takes.
        show: called with each number of questions that are done.
    """

    def __init__(self, answering: Answering, prompts: Prompts, window: int, show: Callable[[int], None]) -> None:
        super().__init__()
        self.answering, self.prompts, self.window, self.show = answering, prompts, window, show
        self.seed = 0
        self._device = answering.student.model.device
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._rank, self._world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The prompt as text. Its ids are kept: in them, what data says is no control token."""
        return self.prompts.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer for lm-eval's cache of requests, which is not used."""
        return str(self.answering.student.tokenizer.name_or_path)

    def generate_until(self, requests: list[Instance]) -> list[Answer]:
        """An Answer to each request."""
        longest = max(len(self.prompts.ids(request.args[0])) for request in requests)
        return self.answering.in_batches(self._answers, longest, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[LogLikelihood]:
        """Log-likelihood of each continuation after its prompt, and whether greedy decoding would write it."""
        return self._scored([self.prompts.pair(*request.args) for request in requests], requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Log-likelihood of each text, in windows that do not overlap, as lm-eval's HFLM divides it."""
        numbers: list[int] = []
        pairs: list[Pair] = []
        for number, request in enumerate(requests):
            ids = self.prompts.text_ids(request.args[0])
            for window in get_rolling_token_windows(ids, self.prompts.first, self.window, context_len=1):
                numbers.append(number)
                pairs.append(make_disjoint_window(window))
        sums = [0.0] * len(requests)
        for number, (value, _) in zip(numbers, self._scored(pairs, requests), strict=True):
            sums[number] += value
        return sums

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

    def _answers(self, batch_size: int, requests: list[Instance]) -> list[Answer]:
        torch.manual_seed(self.seed)
        # As lm-eval's HFLM orders them: the longest prompts first, so that batches hold the same rows as there.
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda args: (-len(self.prompts.ids(args[0])), args[0]),
            group_fn=lambda args: args[1],
            group_by="gen_kwargs",
        )
        answers: list[Answer] = []
        for chunk in order.get_batched(n=batch_size):
            texts, settings = zip(*chunk, strict=True)
            until = settings[0].get("until") or []
            stops = [until] if isinstance(until, str) else until
            answers += self.answering.batch([self.prompts.ids(text) for text in texts], stops)
            self.show(len(texts))
        return list(order.get_original(answers))

    def _scored(self, pairs: list[Pair], requests: list[Instance]) -> list[LogLikelihood]:
        """The log-likelihoods of all pairs; a question is shown as done with its share of them."""
        questions, done = len({request.doc_id for request in requests}), 0

        def show(count: int) -> None:
            """Count pairs, show questions."""
            nonlocal done
            before, done = done, done + count
            self.show(done * questions // len(pairs) - before * questions // len(pairs))

        def scored(batch_size: int) -> list[LogLikelihood]:
            """All of them, so many sequences at once."""
            return log_likelihoods(self.answering.student.model, pairs, batch_size, show)

        return self.answering.in_batches(scored, max(len(head) + len(tail) for head, tail in pairs))
