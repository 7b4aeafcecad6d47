"""Log-probabilities of one model, and the checks that all losses share. A probability of zero makes no NaN.

``log_p: [..., V]`` in nats -> ``[...]`` in nats. The probabilities need not sum to one: the functions also serve k
tokens of a vocabulary, with or without a bucket for the rest.
"""

import math
from typing import Any

import torch
from torch import Tensor

from opcd.losses._kernels import blocks, needs_masks

NEVER = -math.inf
"""The log-probability of a token that cannot occur."""
ABSENT = -1e30
"""A logit so low that the probability is 0, and finite: p log p is 0 without the masks that -inf needs."""


def log_probs(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log softmax(logits / temperature)``, [..., V] -> [..., V] in nats, in float32 (float64 stays float64)."""
    logits = at_least_float32(logits)
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, dim=-1)


def log_probs_(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``log_probs``, written over the logits, which must be float32 or float64; nothing else may use them.

    The backward pass runs once: it writes the gradient over the log-probabilities. On a CPU a new block of that size
    costs as much as the softmax, because the kernel maps and clears it page by page.
    """
    return _InPlace.apply(logits, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, temperature: float) -> Tensor:
        ctx.temperature = temperature
        if temperature != 1.0:
            logits.div_(temperature)
        torch.log_softmax(logits, -1, out=logits)  # a row is summed before its first number is written
        ctx.mark_dirty(logits)
        ctx.save_for_backward(logits)
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        (log_p,) = ctx.saved_tensors
        torch.ops.aten._log_softmax_backward_data.out(upstream, log_p, -1, log_p.dtype, out=log_p)
        return (log_p if ctx.temperature == 1.0 else log_p.div_(ctx.temperature)), None


def merge_(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Join tokens into one outcome: the first gets the sum of their probabilities at the temperature, the others 0.

    [n, V] logits and [m] ids -> [n, V], written over the logits; the backward pass writes over the gradient.
    """
    return _Merge.apply(logits, tokens, temperature)  # type: ignore[no-any-return, no-untyped-call]


class _Merge(torch.autograd.Function):
    """With the merged logit T logsumexp(z / T), d/dz_v = softmax(z / T)_v over the merged tokens."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        own = logits[:, tokens] / temperature
        logits[:, tokens] = ABSENT
        logits[:, tokens[0]] = own.logsumexp(-1) * temperature
        ctx.mark_dirty(logits)
        ctx.save_for_backward(tokens, own.softmax(-1).nan_to_num_(0.0))  # NaN: none of them can occur
        return logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        tokens, shares = ctx.saved_tensors
        upstream[:, tokens] = upstream[:, tokens[:1]] * shares
        return upstream, None, None


def at_least_float32(values: Tensor) -> Tensor:
    """The values in float32; float64 stays float64."""
    return values if values.dtype == torch.float64 else values.float()


@torch.no_grad()
def entropy(log_p: Tensor) -> Tensor:
    """−Σ_v p_v log p_v, [..., V] -> [...] in nats, without gradient."""
    value = log_p.new_empty(log_p.shape[:-1])
    for values, rows in blocks(value, log_p):
        values[:] = -(rows.exp().mul_(rows)).sum(-1)
        if needs_masks(values, rows.shape[-1]):  # 0 · −inf
            values[:] = -(rows.exp().mul_(rows.masked_fill(torch.isneginf(rows), 0.0))).sum(-1)
    return value


def log_total(log_p: Tensor) -> Tensor:
    """``log Σ_v p_v``, [..., V] -> [...]; ``NEVER`` with a zero gradient where every p is 0 or there is no token."""
    if log_p.shape[-1] == 0:
        return log_p.new_full(log_p.shape[:-1], NEVER)
    empty = torch.isneginf(log_p).all(-1)
    return log_p.masked_fill(empty[..., None], 0.0).logsumexp(-1).masked_fill(empty, NEVER)


def check_floating(values: Tensor, name: str) -> None:
    """Raise ``ValueError`` for anything but a floating-point tensor."""
    if not values.is_floating_point():
        raise ValueError(f"{name} are {values.dtype}, not floating point: give a model's output, not token ids")


def check_device(first: Tensor, first_name: str, second: Tensor, second_name: str) -> None:
    """Raise ``ValueError`` for two tensors on two devices."""
    if first.device != second.device:
        raise ValueError(
            f"{first_name} are on {first.device} and {second_name} on {second.device}; move one with .to(device)"
        )


def check_positive(value: float, name: str) -> None:
    """Raise ``ValueError`` for a number that is not positive and finite."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"{name} is {value!r}; it must be a positive finite number")
