"""The student's pass over rows that begin with the same tokens: their prefix is computed once, with its gradient.

Every chat template begins with the same tokens, and prompts may share a system message. Of B rows of T tokens with a
common prefix of S tokens, the layers see S + B (T - S) tokens instead of B T. Only attention gets complete rows, so
any kernel for causal rows works.
"""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opcd.accel import accelerator
from opcd.modules.lm.hidden_states import last_hidden
from opcd.modules.lm.layer_kinds import layer_kinds, sliding_window
from opcd.modules.prefix.prefix_cache import SHORTEST, Mode, disagreement


class StudentPrefix:
    """Last hidden states of rows whose common prefix is computed once, where the model allows it.

    The first two rows are computed both ways first; if the states differ, the prefix is not shared from then on.

    Args:
        mode: auto compares and falls back with a warning; always does not compare; never shares nothing.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._agrees: bool | None = {"auto": None, "always": True, "never": False}[mode]

    def last_hidden(self, model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        """The states of `hidden_states.last_hidden`, which is used if nothing is shared: [N, H]."""
        shared = _common_start(prompts)
        if self._agrees is False or shared < SHORTEST or not _can_share(model):
            return last_hidden(model, prompts, responses)
        if self._agrees is None:
            self._compare(model, prompts[:2], responses[:2], shared)
            return self.last_hidden(model, prompts, responses)
        return _last_hidden(model, prompts, responses, shared)

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor], shared: int) -> None:
        full = last_hidden(model, prompts, responses)
        why = disagreement(lambda: _last_hidden(model, prompts, responses, shared), full)
        self._agrees = why is None
        if why is not None:
            rank_zero_warn(
                f"the student's rows cannot share their prefix in {type(model).__name__} ({why}); from here on they "
                "are computed in full (model.shared_prefix: never turns this warning off)"
            )


def _last_hidden(model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor], shared: int) -> Tensor:
    """The states of rows whose first `shared` tokens are the same."""
    rows = [torch.cat([prompt[shared:], response]) for prompt, response in zip(prompts, responses, strict=True)]
    own = pad_sequence(rows, batch_first=True)
    positions = torch.cat([torch.arange(shared), torch.arange(shared, shared + own.shape[1]).repeat(len(rows))])
    ids = torch.cat([prompts[0][:shared], own.flatten()])
    hidden = model.base_model(
        input_ids=ids[None].to(model.device),
        position_ids=positions[None].to(model.device),
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),  # 4 dimensions: transformers makes no mask then
        use_cache=False,
        **(accelerator(model.device).shared_start(model, len(rows), shared) or {}),
    ).last_hidden_state[0, shared:]
    kept = [
        states[len(prompt) - shared - 1 : len(prompt) - shared + len(response) - 1]
        for states, prompt, response in zip(hidden.unflatten(0, own.shape), prompts, responses, strict=True)
    ]
    return torch.cat(kept)


def _common_start(prompts: list[Tensor]) -> int:
    """The length of the common prefix, without any prompt's last token, whose state predicts; 0 for a single row."""
    if len(prompts) < 2:
        return 0
    length = min(map(len, prompts)) - 1
    together = torch.stack([prompt[:length] for prompt in prompts])
    differ = (together != together[0]).any(0).nonzero()
    return int(differ[0]) if len(differ) else length


def _can_share(model: PreTrainedModel) -> bool:
    """Whether all layers have full attention that takes a shared prefix, and nothing is dropped out."""
    dropout = model.training and (
        any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
        or bool(getattr(model.config.get_text_config(), "attention_dropout", 0))
    )
    return (
        accelerator(model.device).shared_start(model, 2, 1) is not None
        and layer_kinds(model) <= {"full_attention"}
        and sliding_window(model) is None
        and not dropout
    )
