"""The student's pass over rows that begin alike: what they share goes through the layers once, with its gradient.

Every chat template begins with the same tokens, and prompts may have a system message in common. Of B rows of T tokens
whose first S are the same, the layers see S + B (T - S) tokens in place of B T. Attention alone gets whole rows, so any
kernel for causal rows will do.
"""

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from opcd.accel import accelerator
from opcd.modules.lm.hidden_states import last_hidden
from opcd.modules.prefix.packing import sliding_window
from opcd.modules.prefix.prefix_cache import SHORTEST, Mode, disagreement


class StudentPrefix:
    """Last hidden states of rows, their common beginning computed once where that changes nothing.

    The first two rows go both ways at first; where the states differ, every row is whole from then on.

    Args:
        mode: auto compares and falls back with one message; always does neither; never computes every row whole.
    """

    def __init__(self, mode: Mode = "auto") -> None:
        self._agrees: bool | None = {"auto": None, "always": True, "never": False}[mode]

    def last_hidden(self, model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
        """As `scoring.last_hidden`, of which it takes the pass where nothing is shared: [N, H]."""
        shared = _common_start(prompts)
        if self._agrees is False or shared < SHORTEST or not _can_share(model):
            return last_hidden(model, prompts, responses)
        if self._agrees is None:
            self._compare(model, prompts[:2], responses[:2], shared)
            return self.last_hidden(model, prompts, responses)
        return _last_hidden(model, prompts, responses, shared)

    @torch.no_grad()
    def _compare(self, model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor], shared: int) -> None:
        whole = last_hidden(model, prompts, responses)
        why = disagreement(lambda: _last_hidden(model, prompts, responses, shared), whole)
        self._agrees = why is None
        if not self._agrees:
            rank_zero_warn(
                f"rows cannot share their beginning in {type(model).__name__} ({why}); the student's "
                "rows are computed whole from here on (model.shared_prefix: never is silent)"
            )


def _last_hidden(model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor], shared: int) -> Tensor:
    """The states of rows whose first `shared` tokens are the same."""
    rows = [torch.cat([prompt[shared:], response]) for prompt, response in zip(prompts, responses, strict=True)]
    own = pad_sequence(rows, batch_first=True)
    places = torch.cat([torch.arange(shared), torch.arange(shared, shared + own.shape[1]).repeat(len(rows))])
    ids = torch.cat([prompts[0][:shared], own.flatten()])
    hidden = model.base_model(
        input_ids=ids[None].to(model.device),
        position_ids=places[None].to(model.device),
        attention_mask=torch.zeros(1, 1, 1, 1, device=model.device),  # four dimensions: none is made for this one row
        use_cache=False,
        **(accelerator(model.device).shared_start(model, len(rows), shared) or {}),
    ).last_hidden_state[0, shared:]
    kept = [
        states[len(prompt) - shared - 1 : len(prompt) - shared + len(response) - 1]
        for states, prompt, response in zip(hidden.unflatten(0, own.shape), prompts, responses, strict=True)
    ]
    return torch.cat(kept)


def _common_start(prompts: list[Tensor]) -> int:
    """How many tokens all begin with; not the last of any, whose state predicts the response. 0 for a row alone."""
    if len(prompts) < 2:
        return 0
    length = min(map(len, prompts)) - 1
    together = torch.stack([prompt[:length] for prompt in prompts])
    differ = (together != together[0]).any(0).nonzero()
    return int(differ[0]) if len(differ) else length


def _can_share(model: PreTrainedModel) -> bool:
    """Whether layers attend to all that came before, by an attention that takes a shared start, and drop nothing."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or [])
    dropped = model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules())
    dropped |= model.training and bool(getattr(config, "attention_dropout", 0))
    return (
        accelerator(model.device).shared_start(model, 2, 1) is not None
        and kinds <= {"full_attention"}
        and sliding_window(model) is None
        and not dropped
    )
