"""How far the policy that wrote the responses is from the student that learns on them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opcd.losses import chunked
from opcd.modules.lm.hidden_states import HiddenStates
from opcd.modules.trajectories import Trajectories


@dataclass
class RolloutMismatch:
    """What is known of N response tokens.

    Attributes:
        log_ratios: log p_S(y) - log p_B(y) in nats, of the plain softmax, without gradient, [N]; p_B is the policy that
            wrote them. 0 where it has not said.
        known: whether it has said, [N].
    """

    log_ratios: Tensor
    known: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, student: HiddenStates, trajectories: Trajectories) -> "RolloutMismatch | None":
        """None where no rollout gave log-probabilities: nothing is computed then."""
        if all(log_probs is None for log_probs in trajectories.log_probs):
            return None
        device = student.hidden.device
        tokens = torch.cat(trajectories.responses).to(device)
        (own,) = chunked(
            lambda log_p, y: (log_p.gather(-1, y[:, None])[:, 0].clone(),),
            *(student.hidden.detach(), student.head),
            per_token=(tokens,),
        )
        pairs = list(zip(trajectories.log_probs, trajectories.responses, strict=True))
        known = torch.cat([torch.full(y.shape, given is not None) for given, y in pairs]).to(device)
        theirs = torch.cat([torch.zeros(len(y), device=y.device) if given is None else given for given, y in pairs]).to(
            own
        )
        return cls(torch.where(known, own - theirs, 0), known)

    @property
    def gap(self) -> Tensor:
        """|log p_S(y) - log p_B(y)| of the tokens where it is known, [<= N] in nats."""
        return self.log_ratios[self.known].abs()

    def importance(self, limit: float) -> Tensor:
        """min(p_S(y) / p_B(y), limit), [N]."""
        return self.log_ratios.exp().clamp(max=limit)
