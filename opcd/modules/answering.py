"""A student's answers outside training: with or without a context, whose keys and values are computed once."""

import torch
from torch import Tensor

from opcd.data import Views
from opcd.modules.lm.decoding import Told
from opcd.modules.lm.generation import Sampling, eval_mode, generate, own_precision
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student


def respond(
    student: Student,
    views: Views,
    prompts: list[list[int]],
    context: str | None,
    sampling: Sampling,
    prefix: PrefixCache,
    told: Told | None = None,
) -> list[Tensor]:
    """Token ids [R] of one response to each prompt.

    Args:
        student: model and tokenizer.
        views: what made the prompts.
        prompts: their token ids, the context's included.
        context: the context that stands in all of them, or None.
        sampling: how tokens are drawn, from torch's default generator.
        prefix: what keeps the keys and values of the context.
        told: hears of every token when it is written.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    prefixes = None
    model = student.model
    if context is not None:
        shared = torch.tensor(views.teacher_prefix(context))
        with torch.no_grad(), eval_mode(model), own_precision(model):
            # The first row once more: a row that is alone is then answered as it would be beside others.
            found = prefix.encoded(model, [shared] * (len(rows) + 1), [*rows, rows[0]])
        prefixes = found[:-1] if found else None
    return generate(model, rows, sampling, student.eos_ids, student.pad_id, prefixes, told)
