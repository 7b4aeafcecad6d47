"""The check that an export behaves as the student: logits on a fixed prompt, and the greedy answer to it."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.data.chat_template import ChatRenderer, TextEncoder
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.student import Student
from opcd.runtime.errors import UserError

PROMPT = "Who wrote “Faust”, in which year, and what are 1234 + 567 and naïve façades? Answer in two lines:\n1."
GREEDY = Sampling(max_new_tokens=32, temperature=0.0)
TOLERANCE = 1e-4
"""The allowed difference of logits, relative to the largest logit: sums have another order (measured: 7e-6)."""


@dataclass(frozen=True)
class Behaviour:
    """A model's behaviour on the prompt.

    Attributes:
        prompt: the prompt's token ids, [P].
        answer: the greedy continuation, [R].
        logits: the logits at every position of both, [P + R, V], in float32.
        eos_ids: tokens that end the answer.
    """

    prompt: Tensor
    answer: Tensor
    logits: Tensor
    eos_ids: set[int]


def prompt_ids(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Ids of the prompt, in the chat template if there is one: [P]."""
    text = PROMPT
    if tokenizer.chat_template is not None:
        renderer = ChatRenderer(TextEncoder(tokenizer), {}, "the student")
        text = renderer.render([{"role": "user", "content": PROMPT}])
    return torch.tensor(tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"])


def behaviour(student: Student) -> Behaviour:
    """The student's behaviour on the prompt."""
    prompt = prompt_ids(student.tokenizer)
    answer = _answer(student, prompt, student.eos_ids)
    return Behaviour(prompt, answer, logits_of(student.model, torch.cat([prompt, answer])), student.eos_ids)


def _answer(student: Student, prompt: Tensor, eos_ids: set[int]) -> Tensor:
    """The greedy answer, on the CPU: [P] -> [R]."""
    return generate(student.model, [prompt], GREEDY, eos_ids, student.pad_id)[0].cpu()


@torch.no_grad()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits at every position, on the CPU: [T] -> [T, V] in float32.

    The model may be on a GPU: bitsandbytes puts quantized models there.
    """
    return model(input_ids=ids[None].to(model.device)).logits[0].float().cpu()  # type: ignore[no-any-return]


def check_same(expected: Behaviour, found: Student, what: str) -> float:
    """Compare a model with the expected behaviour and return the largest absolute difference of logits.

    Args:
        expected: the expected behaviour.
        found: the model with its tokenizer.
        what: the model's name in the error.

    Raises:
        UserError: the prompt's ids differ, the logits differ by more than `TOLERANCE`, or the greedy answers differ.
    """
    prompt = prompt_ids(found.tokenizer)
    if not torch.equal(prompt, expected.prompt):
        raise UserError(
            f"{what} encodes the check's prompt differently: {prompt.tolist()}, not {expected.prompt.tolist()}"
        )
    logits = logits_of(found.model, torch.cat([prompt, expected.answer]))
    difference = float((logits - expected.logits).abs().max())
    most = TOLERANCE * float(expected.logits.abs().max())
    if not difference <= most:  # not `>`: NaN must raise
        raise UserError(f"{what} has other logits than the student: by {difference:.3g}; at most {most:.3g} is allowed")
    answer = _answer(found, prompt, expected.eos_ids)
    if not torch.equal(answer, expected.answer):
        raise UserError(
            f"{what} answers the check's prompt differently: {answer.tolist()}, not {expected.answer.tolist()}"
        )
    return difference


@torch.no_grad()
def round_weights(model: PreTrainedModel, dtype: torch.dtype, least_dimensions: int = 1) -> None:
    """Round float32 weights of at least `least_dimensions` dimensions to `dtype`, in place.

    Raises:
        UserError: a weight is too large for the type.
    """
    for name, weight in model.named_parameters():
        if weight.dim() < least_dimensions:
            continue
        rounded = weight.to(dtype)
        if not rounded.isfinite().all():
            raise UserError(f"{name} holds {weight.abs().max():.3g}, which {dtype} cannot; choose --dtype bfloat16")
        weight.copy_(rounded)
