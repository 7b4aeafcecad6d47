"""A model for lm-eval: answers that are generated as in training and `opcd predict`, and log-likelihoods.

lm-eval's own HFLM is not used: it leaves a live model in eval mode and ties its weights again, merges the model's
generation config into the settings, and does not report an answer's length or whether it was cut off.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import Collator
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from opcd.evaluation.batched_answers import Answer, Answering, gather_on, rank_and_ranks
from opcd.evaluation.task_prompts import Chat, Prompts
from opcd.modules.lm.generation import eval_mode, own_precision
from opcd.modules.lm.hidden_states import head_of
from opcd.runtime.interruption import check

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt and of its continuation, at least one of each."""
LogLikelihood = tuple[float, bool]
"""log p(continuation | prompt) in nats, and whether greedy decoding would write the continuation."""


class AnsweringModel(LM):  # type: ignore[misc]
    """A student as lm-eval's model.

    `seed` seeds torch's generator before the first answer; it should differ between ranks.

    Args:
        answering: the student, its context, and how it answers.
        prompts: the prompts of the task.
        window: the model's context window in tokens.
        show: called with each number of finished questions.
    """

    def __init__(self, answering: Answering, prompts: Prompts, window: int, show: Callable[[int], None]) -> None:
        super().__init__()
        self.answering, self.prompts, self.window, self.show = answering, prompts, window, show
        self.seed = 0
        self._device = answering.student.model.device
        self._rank, self._world_size = rank_and_ranks()

    def apply_chat_template(self, chat_history: Chat, add_generation_prompt: bool = True) -> str:
        """The prompt as text. `prompts` keeps its token ids, in which text of a row is never a control token."""
        return self.prompts.render(chat_history, add_generation_prompt)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, which lm-eval requires."""
        return str(self.answering.student.tokenizer.name_or_path)

    def generate_until(self, requests: list[Instance]) -> list[Answer]:
        """The answer to each request."""
        longest = max(len(self.prompts.ids(request.args[0])) for request in requests)
        return self.answering.in_batches(self._answers, longest, requests)

    def loglikelihood(self, requests: list[Instance]) -> list[LogLikelihood]:
        """The log-likelihood of each continuation after its prompt."""
        return self._scored([self.prompts.pair(*request.args) for request in requests], requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood of each text in nats, in disjoint windows as in lm-eval's HFLM."""
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
        """The tensors of all ranks, stacked. lm-eval calls this and the next two with several ranks only."""
        parts = [torch.zeros_like(tensor) for _ in range(self._world_size)]
        torch.distributed.all_gather(parts, tensor)
        return torch.stack(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on rank `dst`, None on the others."""
        return gather_on(dst, obj)

    def barrier(self) -> None:
        """Wait for the other ranks."""
        torch.distributed.barrier()

    def _answers(self, batch_size: int, requests: list[Instance]) -> list[Answer]:
        torch.manual_seed(self.seed)
        # The order of lm-eval's HFLM, the longest prompts first, so that batches hold the same rows as there.
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
        """The log-likelihoods of all pairs. Progress counts questions, in proportion to the finished pairs."""
        questions, done = len({request.doc_id for request in requests}), 0

        def show(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            self.show(done * questions // len(pairs) - before * questions // len(pairs))

        longest = max(len(head) + len(tail) for head, tail in pairs)
        return self.answering.in_batches(self._log_likelihoods, longest, pairs, show)

    @torch.no_grad()
    def _log_likelihoods(self, batch_size: int, pairs: list[Pair], show: Callable[[int], None]) -> list[LogLikelihood]:
        """The log-likelihoods of all pairs, with `batch_size` sequences per batch, the longest first.

        Pairs that differ in their last token only (the letters of a multiple choice) share one sequence.
        """
        model = self.answering.student.model
        sequences: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, (head, tail) in enumerate(pairs):
            sequences[*head, *tail[:-1]].append(number)
        order = sorted(sequences, key=lambda ids: (-len(ids), ids))
        found: dict[int, LogLikelihood] = {}
        with eval_mode(model), own_precision(model):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                # Right padding needs no mask, because attention is causal.
                rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
                hidden = model.base_model(input_ids=rows.to(model.device), use_cache=False).last_hidden_state
                for states, ids in zip(hidden, batch, strict=True):
                    tails = {number: torch.tensor(pairs[number][1], device=hidden.device) for number in sequences[ids]}
                    scored = states[len(ids) - max(map(len, tails.values())) : len(ids)]
                    log_probs = head_of(model)(scored).float().log_softmax(-1)
                    for number, tokens in tails.items():
                        own = log_probs[-len(tokens) :]
                        value = own.gather(-1, tokens[:, None]).sum()
                        found[number] = float(value), bool((own.argmax(-1) == tokens).all())
                check()
                show(sum(len(sequences[ids]) for ids in batch))
        return [found[number] for number in range(len(pairs))]
