"""A Cartridge (arXiv:2506.06266): a trained prefix of keys and values over a model with frozen weights, through peft.

How it works:
    1. the model reads the first P tokens of the context, as a teacher's prompt begins; their keys and values are the
       prefix's first values, in float32
    2. the first token stays as it is: many models use it as an attention sink
    3. the others are trained as any adapter is; the model itself stays, and is the teacher with the prefix off

The original trains on conversations that were recorded before; here the student writes the responses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.data import ContextQueryDataModule
from opcd.models.key_value_prefix import attach_prefix, keys_and_values
from opcd.runtime.errors import UserError

FROZEN = 1
"""The first tokens that are not trained."""
EXACT, LOW_PRECISION = 1e-3, 0.05
"""The largest relative difference of a hidden state behind the prefix from that of a full pass."""


@dataclass
class Cartridge:
    """A trained prefix of keys and values in place of the context's first tokens; the first one stays as it is."""

    num_virtual_tokens: int = 128
    """Tokens of the prefix, at most those of the context in the teacher's prompt."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens <= FROZEN:
            raise ValueError(
                f"num_virtual_tokens must be at least {FROZEN + 1}, because the first token is not trained, got "
                f"{self.num_virtual_tokens}"
            )


def context_start(data: object, cartridge: Cartridge) -> Tensor:
    """The token ids that the prefix begins as: the first ones of the teacher's prompts with the context, [P].

    Raises:
        UserError: there is not one context, or it has too few tokens.
    """
    if not isinstance(data, ContextQueryDataModule):
        raise UserError("model.adapter: a Cartridge begins as the context of a ContextQueryDataModule; pass one")
    contexts = set(data.contexts)
    if len(contexts) != 1:
        raise UserError(
            f"model.adapter: a Cartridge holds one context, and the data has {len(contexts) or 'none'}; set "
            "data.context to a file with one context and leave those of the rows out, or use Lora"
        )
    ids = data.views.teacher_prefix(contexts.pop())
    if len(ids) < cartridge.num_virtual_tokens:
        raise UserError(
            f"model.adapter.num_virtual_tokens: {cartridge.num_virtual_tokens} are more than the context has: the "
            f"teacher's prompts begin with {len(ids)} tokens of it; set at most that many"
        )
    return torch.tensor(ids[: cartridge.num_virtual_tokens])


@torch.no_grad()
def add_cartridge(model: PreTrainedModel, cartridge: Cartridge, ids: Tensor | None = None) -> None:
    """Freeze the model's weights and put a trained prefix before them: the keys and values of these tokens.

    Args:
        model: in eval mode, without an adapter.
        cartridge: the settings.
        ids: [P] token ids; None: any values, where a checkpoint brings its own.

    Raises:
        UserError: the model keeps more or other than one kind of keys and values.
    """
    from peft import CartridgeConfig, prompt_embeddings_from_past_key_values

    if ids is None:
        ids = torch.zeros(cartridge.num_virtual_tokens, dtype=torch.long)
    ids = ids.to(model.device)
    model.requires_grad_(False)
    layers = keys_and_values(model, ids, "model.adapter")
    full = model.base_model(input_ids=torch.cat([ids, ids[:1]])[None], use_cache=False).last_hidden_state[0, -1]
    _, heads, _, width = layers[0][0].shape
    prefix = attach_prefix(
        model,
        CartridgeConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=len(ids),
            num_frozen_tokens=FROZEN,
            token_dim=heads * width,
            num_attention_heads=heads,
            num_layers=len(layers),
            num_transformer_submodules=1,
        ),
    )
    prefix.load_prompt_embeddings(prompt_embeddings_from_past_key_values(layers, num_virtual_tokens=len(ids)))
    behind = model.base_model(input_ids=ids[None, :1], use_cache=False).last_hidden_state[0, -1]
    difference = float((behind - full).norm() / full.norm())
    if not difference <= (EXACT if full.dtype in (torch.float32, torch.float64) else LOW_PRECISION):
        raise UserError(
            f"model.adapter: {type(model).__name__} does not see a Cartridge as it sees the context (its hidden states "
            f"differ by {difference:.2g}); use Lora"
        )
