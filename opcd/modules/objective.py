"""The comparison of student and teacher at every response token, and the statistics that are measured with it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opcd.data.example import ANCHORS
from opcd.losses import Loss, chunked, clip_nats, top1_agreement
from opcd.losses import log_probs as measure
from opcd.modules.lm.hidden_states import HiddenStates, Routed, TeacherOutput
from opcd.modules.trajectories import Trajectories


@dataclass
class Objective:
    """The loss between student and teacher and its statistics.

    Attributes:
        loss: what is compared at one token.
        temperature: divides the logits of both models.
        max_nats: clips a token's divergence from above, with a gradient of zero; None: no clipping.
        importance_clip: weigh a token by min(p_S(y) / p_B(y), importance_clip), where p_B is the policy that wrote it;
            None: all tokens have the same weight.
        merged: [m] ids of end-of-sequence tokens that count as one outcome in both distributions; None: all tokens are
            different.
    """

    loss: Loss
    temperature: float
    max_nats: float | None
    importance_clip: float | None = None
    merged: Tensor | None = None

    def __call__(
        self, student: HiddenStates, teacher: TeacherOutput, trajectories: Trajectories, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The `divergence` of every response token in nats, with gradient, and statistics without: each [N].

        With several teachers, also the `divergence/<name>` [n] of each teacher that has tokens here. Anchors have
        `divergence/anchors` alone: all other values are of the rows with a context.
        With `weights` [N], the weight of each token in the step, also the `loss`, a scalar with gradient, and, where
        the rollout gave log-probabilities, `rollout_logprob_gap` in nats.
        """
        if weights is None:
            return self._values(student, teacher, trajectories, None)
        gap: dict[str, Tensor] = {}
        if (found := rollout_log_ratios(student, trajectories)) is not None:
            log_ratios, known = found
            gap["rollout_logprob_gap"] = log_ratios[known].abs()
            if self.importance_clip is not None:
                weights = weights * log_ratios.exp().clamp(max=self.importance_clip)
        values = self._values(student, teacher, trajectories, weights)
        apart = trajectories.anchors.repeat_interleave(trajectories.lengths)
        names = {"divergence": ~apart, f"divergence/{ANCHORS}": apart}
        places = {name: tokens.nonzero()[:, 0].to(weights.device) for name, tokens in names.items() if name in values}
        losses = [(values[name] * weights[tokens]).sum() for name, tokens in places.items()]
        return values | gap | {"loss": torch.stack(losses).sum()}

    def _values(
        self, student: HiddenStates, teacher: TeacherOutput, trajectories: Trajectories, weights: Tensor | None
    ) -> dict[str, Tensor]:
        if isinstance(teacher, Routed):
            return self._routed(student, teacher, trajectories, weights)
        terms: Callable[..., dict[str, Tensor]]
        hidden, head, device = None, None, student.hidden.device
        merged = None if self.merged is None else self.merged.to(device)
        if isinstance(teacher, HiddenStates):
            terms, hidden, head = self._terms, teacher.hidden, teacher.head
            tokens = torch.cat(trajectories.responses).to(device)
            if merged is not None:
                tokens = torch.where(torch.isin(tokens, merged), merged[0], tokens)
            per_token: tuple[Tensor, ...] = (tokens,)
        else:
            terms, per_token = self._recorded_terms, teacher.rows
        names: list[str] = []

        def values(*chunk: Tensor) -> tuple[Tensor, ...]:
            """The terms of a chunk as a tuple, which `chunked` wants; their names are the same in every chunk."""
            found = terms(*chunk)
            names[:] = found
            return tuple(found.values())

        sides = (student.hidden, student.head, hidden, head)
        results = chunked(
            values, *sides, per_token, weights=weights, temperature=self.temperature, merged_tokens=merged
        )
        return dict(zip(names, results, strict=True))

    def _routed(
        self, student: HiddenStates, teacher: Routed, trajectories: Trajectories, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Compare each row's tokens with its own teacher, and restore the order of the rows; anchors stay apart."""
        by_row = torch.arange(len(student.hidden), device=student.hidden.device).split(trajectories.lengths.tolist())
        found, places = {}, {}
        for name, (rows, target) in teacher.parts.items():
            tokens = torch.cat([by_row[row] for row in rows])
            share = None if weights is None else weights[tokens]
            own = HiddenStates(student.hidden[tokens], student.head)
            found[name] = self._values(own, target, trajectories.select(rows), share)
            places[name] = tokens
        named = {f"divergence/{name}": values["divergence"] for name, values in found.items() if name is not None}
        parts = [found[name] for name in found if name != ANCHORS]
        if not parts:
            return named
        order = torch.cat([tokens for name, tokens in places.items() if name != ANCHORS]).argsort()
        return {name: torch.cat([values[name] for values in parts])[order] for name in parts[0]} | named

    def _terms(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """All values of one chunk, from the log-probabilities [n, V] of both models and the tokens [n]."""
        return self._clipped(self.loss.values(student, teacher, tokens)) | {
            "student_entropy": measure.entropy(student),
            "teacher_entropy": measure.entropy(teacher),
            "top1_agreement": top1_agreement(student, teacher),
        }

    def _recorded_terms(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The same from recorded tokens and their log-probabilities: [n, k] each, or [n] of the sampled tokens."""
        values = self._clipped(self.loss.values_of_record(student, tokens, log_probs))
        values["student_entropy"] = measure.entropy(student)
        if tokens.dim() > 1:
            likeliest = tokens.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0]
            values["top1_agreement"] = (student.argmax(-1) == likeliest).float()
        return values

    def _clipped(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Clip the divergence at `max_nats`, if set, and add which tokens were `clipped`."""
        if self.max_nats is None:
            return values
        exact = values["divergence"]
        clipped = {"divergence": clip_nats(exact, self.max_nats), "clipped": (exact > self.max_nats).float()}
        return clipped | {name: value for name, value in values.items() if name != "divergence"}


@torch.no_grad()
def rollout_log_ratios(student: HiddenStates, trajectories: Trajectories) -> tuple[Tensor, Tensor] | None:
    """log p_S(y) - log p_B(y) in nats of the plain softmax, [N]; p_B is the policy that wrote the tokens.

    The second tensor says where p_B is known, [N] bool; the ratio is 0 elsewhere. None if no row has log-probabilities.
    """
    if all(log_probs is None for log_probs in trajectories.log_probs):
        return None
    device = student.hidden.device
    (own,) = chunked(
        lambda log_p, y: (log_p.gather(-1, y[:, None])[:, 0].clone(),),
        *(student.hidden.detach(), student.head),
        per_token=(torch.cat(trajectories.responses).to(device),),
    )
    pairs = [(row.log_probs, row.response) for row in trajectories.rows]
    known = torch.cat([torch.full(y.shape, given is not None) for given, y in pairs]).to(device)
    theirs = torch.cat([torch.zeros(len(y), device=y.device) if given is None else given for given, y in pairs])
    return torch.where(known, own - theirs.to(own), 0), known
