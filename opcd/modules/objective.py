"""What is compared at every response token, and what is measured beside it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opcd.losses import Loss, chunked, clip_nats, top1_agreement
from opcd.losses import log_probs as measure
from opcd.modules.lm.hidden_states import HiddenStates, Routed, TeacherOutput
from opcd.modules.rollout_mismatch import RolloutMismatch
from opcd.modules.trajectories import Trajectories


@dataclass
class Objective:
    """The loss between student and teacher and its statistics.

    Attributes:
        loss: what is compared at one token.
        temperature: divides the logits of both models.
        max_nats: clips a token's divergence from above, with a gradient of zero; None clips nothing.
        importance_clip: a token that p_B wrote counts by min(p_S(y) / p_B(y), importance_clip); None: all count the
            same.
    """

    loss: Loss
    temperature: float
    max_nats: float | None
    importance_clip: float | None = None

    def __call__(
        self, student: HiddenStates, teacher: TeacherOutput, trajectories: Trajectories, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Nats of every response token (`divergence`), with gradient, and statistics without: each [N].

        Of several teachers, also the `divergence/<name>` of each one's n tokens, [n], where it has any.
        With `weights` [N], what each token counts in the step, also the `loss`, a scalar with gradient, and, where the
        policy that wrote the tokens has said their log-probabilities, `rollout_logprob_gap` in nats.
        """
        if weights is None:
            return self._values(student, teacher, trajectories, None)
        mismatch = RolloutMismatch.of(student, trajectories)
        if mismatch is not None and self.importance_clip is not None:
            weights = weights * mismatch.importance(self.importance_clip)
        values = self._values(student, teacher, trajectories, weights)
        gap = {} if mismatch is None else {"rollout_logprob_gap": mismatch.gap}
        return values | gap | {"loss": (values["divergence"] * weights).sum()}

    def _values(
        self, student: HiddenStates, teacher: TeacherOutput, trajectories: Trajectories, weights: Tensor | None
    ) -> dict[str, Tensor]:
        if isinstance(teacher, Routed):
            return self._routed(student, teacher, trajectories, weights)
        known = {"weights": weights, "temperature": self.temperature}
        if isinstance(teacher, HiddenStates):
            sides = (student.hidden, student.head, teacher.hidden, teacher.head)
            tokens = torch.cat(trajectories.responses).to(student.hidden.device)
            return _named(self._terms, lambda terms: chunked(terms, *sides, (tokens,), **known))  # type: ignore[arg-type]
        rows, side = teacher.rows, (student.hidden, student.head)
        return _named(self._recorded_terms, lambda terms: chunked(terms, *side, per_token=rows, **known))  # type: ignore[arg-type]

    def _routed(
        self, student: HiddenStates, teacher: Routed, trajectories: Trajectories, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Each row's tokens against its own teacher, put back into the order of the rows."""
        by_row = torch.arange(len(student.hidden), device=student.hidden.device).split(trajectories.lengths.tolist())
        found, places = {}, []
        for name, (rows, target) in teacher.parts.items():
            tokens = torch.cat([by_row[row] for row in rows])
            share = None if weights is None else weights[tokens]
            own = HiddenStates(student.hidden[tokens], student.head)
            found[name] = self._values(own, target, trajectories.select(rows), share)
            places.append(tokens)
        order, parts = torch.cat(places).argsort(), list(found.values())
        whole = {name: torch.cat([values[name] for values in parts])[order] for name in parts[0]}
        return whole | {f"divergence/{name}": values["divergence"] for name, values in found.items()}

    def _terms(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Everything for one chunk, from the log-probabilities [n, V] and the tokens [n]."""
        return self._clipped(self.loss.values(student, teacher, tokens)) | {
            "student_entropy": measure.entropy(student),
            "teacher_entropy": measure.entropy(teacher),
            "top1_agreement": top1_agreement(student, teacher),
        }

    def _recorded_terms(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> dict[str, Tensor]:
        """The same from the teacher's recorded tokens and their log-probabilities, [n, k] each; [n] of the sampled."""
        values = self._clipped(self.loss.values_of_record(student, tokens, log_probs))
        values["student_entropy"] = measure.entropy(student)
        if tokens.dim() > 1:
            likeliest = tokens.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0]
            values["top1_agreement"] = (student.argmax(-1) == likeliest).float()
        return values

    def _clipped(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The divergence clipped, and whether it was, where there is a limit."""
        if self.max_nats is None:
            return values
        whole = values["divergence"]
        clipped = {"divergence": clip_nats(whole, self.max_nats), "clipped": (whole > self.max_nats).float()}
        return clipped | {name: value for name, value in values.items() if name != "divergence"}


def _named(
    terms: Callable[..., dict[str, Tensor]], run: Callable[[Callable[..., tuple[Tensor, ...]]], tuple[Tensor, ...]]
) -> dict[str, Tensor]:
    """What `run` makes of a function that gives values by name, where it knows tuples alone (`opcd.losses.chunked`)."""
    names: list[str] = []

    def values(*sides: Tensor) -> tuple[Tensor, ...]:
        """Of a chunk; their names are the same in all."""
        found = terms(*sides)
        names[:] = found
        return tuple(found.values())

    return dict(zip(names, run(values), strict=True))
