"""Log-likelihoods of continuations of prompts, in batches."""

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.modules.lm.generation import eval_mode, own_precision
from opcd.modules.lm.hidden_states import head_of
from opcd.runtime.interruption import check

Pair = tuple[list[int], list[int]]
"""Token ids of a prompt, at least one, and of its continuation, at least one."""
LogLikelihood = tuple[float, bool]
"""log p(continuation | prompt) in nats, and whether each of its tokens is the likeliest one."""


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel, pairs: list[Pair], batch_size: int, show: Callable[[int], None]
) -> list[LogLikelihood]:
    """The log-likelihood of every pair, in their order.

    Pairs that differ in their last token only (the letters of a multiple choice) share one sequence of the batch.

    Args:
        model: the model; it is left as it was.
        pairs: prompts and continuations.
        batch_size: sequences at once; the longest come first.
        show: called with each number of pairs that are done.
    """
    sequences: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (head, tail) in enumerate(pairs):
        sequences[*head, *tail[:-1]].append(number)
    order = sorted(sequences, key=lambda ids: (-len(ids), ids))
    found: dict[int, LogLikelihood] = {}
    with eval_mode(model), own_precision(model):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            # Padded on the right: attention is causal, so that no mask is needed.
            rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in batch], batch_first=True)
            hidden = model.base_model(input_ids=rows.to(model.device), use_cache=False).last_hidden_state
            for states, ids in zip(hidden, batch, strict=True):
                tails = [pairs[number][1] for number in sequences[ids]]
                scored = states[len(ids) - max(map(len, tails)) : len(ids)]
                log_probs = head_of(model)(scored).float().log_softmax(-1)
                for number, tail in zip(sequences[ids], tails, strict=True):
                    found[number] = _of(log_probs, tail)
            check()
            show(sum(len(sequences[ids]) for ids in batch))
    return [found[number] for number in range(len(pairs))]


def _of(log_probs: Tensor, tail: list[int]) -> LogLikelihood:
    """Of a continuation whose last token the last row of `log_probs` [R, V] predicts."""
    tokens = torch.tensor(tail, device=log_probs.device)
    own = log_probs[-len(tail) :]
    value = own.gather(-1, tokens[:, None]).sum()
    return float(value), bool((own.argmax(-1) == tokens).all())
