"""Last hidden states at the positions that predict a response, and the head that turns them into logits."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.losses import Head, RecordedTokens, RecordedTopK
from opcd.runtime.errors import UserError


@dataclass
class HiddenStates:
    """A model's output for N response tokens, before the head.

    Attributes:
        hidden: last hidden states, [N, H]; row i predicts response token i.
        head: [N, H] -> logits [N, V].
    """

    hidden: Tensor
    head: Head


@dataclass
class Routed:
    """The outputs of several teachers for the response tokens of a batch.

    Attributes:
        parts: by the teacher's name: the numbers of its rows, and its output for their tokens, in that order. Every row
            is in one part.
    """

    parts: dict[str | None, tuple[list[int], "TeacherOutput"]]


TeacherOutput = HiddenStates | RecordedTopK | RecordedTokens | Routed
"""A teacher's output for N response tokens."""


def last_hidden(model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
    """Run prompt + response of every row and keep the states that predict the responses, in row order: [N, H].

    Rows are padded on the right. No mask is needed: attention is causal, so no row's tokens see the padding, and
    positions start at 0 in every row.
    """
    rows = [torch.cat([prompt, response]) for prompt, response in zip(prompts, responses, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
    # use_cache: in training mode, a model must not keep keys and values.
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    pairs = zip(hidden, prompts, responses, strict=True)
    return torch.cat([row[len(prompt) - 1 : len(prompt) + len(response) - 1] for row, prompt, response in pairs])


def head_of(model: PreTrainedModel) -> Head:
    """The model's head with the soft-capping (Gemma) and logit scale (Cohere, Granite) of its config."""
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(model.get_output_embeddings(), softcap=getattr(config, "final_logit_softcapping", None), scale=scale)


@torch.no_grad()
def check_head(model: PreTrainedModel, key: str) -> None:
    """Compare `head_of` with the model's own logits on two tokens, in the model's own precision.

    Raises:
        UserError: the model computes its logits in an unknown way; training it would be wrong.
    """
    ids = torch.tensor([[0, 1]], device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    ours = head_of(model)(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    if not torch.allclose(own, ours, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        raise UserError(
            f"{key}: {type(model).__name__} computes its logits in a way that opcd does not know "
            "(neither a plain head nor soft-capping nor a scale); choose a model of another family"
        )
