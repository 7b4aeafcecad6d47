"""What is compared at every response token, and what is measured beside it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opcd.losses import Divergence, SampledReverseKL, TopK, chunked, clip_nats, top1_agreement
from opcd.losses import log_probs as measure
from opcd.modules.lm.hidden_states import Routed, States, Target
from opcd.modules.trajectories import Trajectories


@dataclass
class Objective:
    """The divergence between student and teacher and its statistics.

    Attributes:
        loss: the divergence at one token.
        temperature: divides the logits of both models.
        max_nats: clips a token's divergence from above, with a gradient of zero; None clips nothing.
    """

    loss: Divergence | SampledReverseKL
    temperature: float
    max_nats: float | None

    def __call__(
        self, student: States, teacher: Target, trajectories: Trajectories, weights: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Nats of every response token (`divergence`), with gradient, and statistics without: each [N].

        Of several teachers, also the `divergence/<name>` of each one's n tokens, [n], where it has any.
        `weights` [N] is what each token will count in the loss, where that is known: see `opcd.losses.chunked`.
        """
        if isinstance(teacher, Routed):
            return self._routed(student, teacher, trajectories, weights)
        if not isinstance(teacher, States):
            known = {"weights": weights, "temperature": self.temperature}
            values = chunked(self._recorded_terms, student.hidden, student.head, per_token=teacher.rows, **known)  # type: ignore[arg-type]
            return dict(zip(self._recorded_names(), values, strict=True))
        states = (student.hidden, student.head, teacher.hidden, teacher.head)
        tokens = torch.cat(trajectories.responses).to(student.hidden.device)
        measured = chunked(self._terms, *states, (tokens,), weights=weights, temperature=self.temperature)
        return dict(zip(self._names(), measured, strict=True))

    def _routed(
        self, student: States, teacher: Routed, trajectories: Trajectories, weights: Tensor | None
    ) -> dict[str, Tensor]:
        """Each row's tokens against its own teacher, put back into the order of the rows."""
        by_row = torch.arange(len(student.hidden), device=student.hidden.device).split(trajectories.lengths.tolist())
        found, places = {}, []
        for name, (rows, target) in teacher.parts.items():
            tokens = torch.cat([by_row[row] for row in rows])
            share = None if weights is None else weights[tokens]
            own = States(student.hidden[tokens], student.head)
            found[name] = self(own, target, trajectories.select(rows), share)
            places.append(tokens)
        order, parts = torch.cat(places).argsort(), list(found.values())
        whole = {name: torch.cat([values[name] for values in parts])[order] for name in parts[0]}
        return whole | {f"divergence/{name}": values["divergence"] for name, values in found.items()}

    def _terms(self, student: Tensor, teacher: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        """Everything for one chunk, from the log-probabilities [n, V] and the tokens [n], in the order of `_names`."""
        if isinstance(self.loss, SampledReverseKL):
            values = [self.loss(*(log_p.gather(-1, tokens[:, None])[:, 0] for log_p in (student, teacher)))]
        elif isinstance(self.loss, TopK):
            values = list(self.loss.with_retained_mass(student, teacher))
        else:
            values = [self.loss.from_log_probs(student, teacher)]
        values = self._clipped(values)
        values += [measure.entropy(student), measure.entropy(teacher), top1_agreement(student, teacher)]
        return tuple(values)

    def _recorded_terms(self, student: Tensor, tokens: Tensor, log_probs: Tensor) -> tuple[Tensor, ...]:
        """The same from the teacher's recorded tokens and their log-probabilities, [n, k] each; [n] of the sampled."""
        if isinstance(self.loss, SampledReverseKL):
            values = self._clipped([self.loss(student.gather(-1, tokens[:, None])[:, 0], log_probs)])
            return *values, measure.entropy(student)
        assert isinstance(self.loss, TopK)  # the teacher's `check`
        values = self._clipped([self.loss.from_record(student, tokens, log_probs)])
        agrees = student.argmax(-1) == tokens.gather(-1, log_probs.argmax(-1, keepdim=True))[:, 0]
        return *values, measure.entropy(student), agrees.float()

    def _recorded_names(self) -> list[str]:
        agreement = [] if isinstance(self.loss, SampledReverseKL) else ["top1_agreement"]
        return ["divergence", *([] if self.max_nats is None else ["clipped"]), "student_entropy", *agreement]

    def _clipped(self, values: list[Tensor]) -> list[Tensor]:
        """The first value clipped, and whether it was, where there is a limit."""
        if self.max_nats is None:
            return values
        return [clip_nats(values[0], self.max_nats), (values[0] > self.max_nats).float(), *values[1:]]

    def _names(self) -> list[str]:
        clipped = [] if self.max_nats is None else ["clipped"]
        retained = ["student_retained_mass", "teacher_retained_mass"] if isinstance(self.loss, TopK) else []
        return ["divergence", *clipped, *retained, "student_entropy", "teacher_entropy", "top1_agreement"]
