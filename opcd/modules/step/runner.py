"""What surrounds the method in a step: time, memory, signals, ranks, non-finite values, running out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from opcd.accel import accelerator
from opcd.data import Batch
from opcd.modules.distributed.sharding import full_tensor
from opcd.modules.rollouts.base import Rollout
from opcd.modules.step.metrics import PhaseTimer, TokenMeans, step_metrics
from opcd.modules.step.nonfinite import refuse_step, what_is_bad
from opcd.modules.step.oom import explain_oom, shrinking
from opcd.modules.step.ranks import Ranks
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.interruption import check, leaving_together

if TYPE_CHECKING:
    from opcd.modules.distiller import Distiller

Result = TypeVar("Result")
Losses = Callable[["Step", Trajectories, Tensor | None], dict[str, Tensor]]
"""The values of a micro-batch, by name, from what each of its tokens counts [N]: see `Objective`."""


class Step:
    """One step of training: runs the parts that the method names, one after the other.

    Attributes:
        max_tokens: most tokens of one forward pass of a model.
        means: what was measured, by name.
    """

    def __init__(self, module: Distiller, batch: Batch) -> None:
        self.module, self.batch = module, batch
        self.max_tokens, self.means = module.micro_batch_tokens, TokenMeans()
        self.timer, self.ranks = PhaseTimer(module.device), Ranks(module.trainer, module.device)
        self.all_sum = self.ranks.all_sum
        self._accelerator = accelerator(module.device)
        self._idle = module.teacher.idle_weights
        self._taken: tuple[Trajectories, Tensor]

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A part of the step: timed, and its memory freed for the next."""
        with self.timer(name), self._accelerator.phase(name, self.module.gradient_checkpointing, self._idle):
            yield
            if self.module.gradient_checkpointing:
                torch.clear_autocast_cache()  # casts of weights; they are made again where they are needed

    def run(self, name: str, function: Callable[..., Result], *args: Any) -> Result:
        """The result of one part of the method."""
        with self.phase(name):
            return function(*args)

    @contextmanager
    def active(self, rollout: Rollout) -> Iterator[None]:
        """The time in which a rollout (and the teacher) has the student's weights of this step."""
        with self._accelerator.phase("sync", self.module.gradient_checkpointing, []), ExitStack() as weights:
            with self.timer("sync"), leaving_together(self.ranks.largest):
                weights.enter_context(rollout.active(self.module.student))
                self.module.teacher.sync_weights(self.module.student)
            yield

    def generate(self, rollout: Rollout) -> Trajectories:
        """The responses of a batch; all ranks leave if one of them must."""
        with self.timer("rollout"), leaving_together(self.ranks.largest):
            return rollout.generate(self.module.student, self.module.teacher, self.batch)

    @contextmanager
    def session(self, teacher: Teacher, rollouts: Trajectories) -> Iterator[None]:
        """The time in which the teacher scores these responses."""
        with ExitStack() as session:
            with self.timer("teacher"), leaving_together(self.ranks.largest):
                session.enter_context(teacher.session(rollouts))
            yield

    def accumulate(self, losses: Losses, rollouts: Trajectories, weights: Tensor) -> None:
        """Add the gradients of all responses up in the student, a micro-batch at a time.

        Args:
            losses: of one micro-batch, with the loss that has a gradient.
            rollouts: of the whole step.
            weights: of one token of each response in the loss of the step, [B].
        """
        run = partial(self._accumulate, losses, rollouts, weights)
        if not self.module.shrink_on_oom:
            return run(self.max_tokens)
        undo = self.module.optimizers().zero_grad  # type: ignore[union-attr]
        self.module.micro_batch_tokens = shrinking(run, undo, self.max_tokens, rollouts.longest)
        return None

    def _accumulate(self, losses: Losses, rollouts: Trajectories, weights: Tensor, max_tokens: int) -> None:
        self.max_tokens, self.means = max_tokens, TokenMeans()
        for part, share, counts, last in self._parts(rollouts, weights):
            values = losses(self, part, share)
            self._measure(values, counts)
            with self.timer("student"):
                self.ranks.backward(self.module, values["loss"], last)

    def _parts(self, rollouts: Trajectories, weights: Tensor) -> Iterator[tuple[Trajectories, Tensor, bool, bool]]:
        """Each micro-batch, what its tokens count in this rank's loss [N], whether they do, and whether it is the last.

        A signal that asks the run to end is noticed here.
        """
        passes = self.ranks.passes(rollouts.micro_batches(self.max_tokens), self._gathering)
        for number, (rows, counts) in enumerate(passes, start=1):
            check()
            part = rollouts.select(rows)
            share = self.ranks.share(weights[rows] * counts, part.lengths, self.module.student.model.dtype)
            yield part, share, counts, number == len(passes)

    @property
    def _gathering(self) -> bool:
        """Whether ranks gather weights of the student or the teacher from one another."""
        return self.ranks.sharded or self.module.teacher.shard

    def _measure(self, values: dict[str, Tensor], counts: bool) -> None:
        """Note the values of a micro-batch; of one that only keeps other ranks company, nothing counts."""
        if counts:
            self.means.add({name: value for name, value in values.items() if name != "loss"})

    def optimize(self, rollouts: Trajectories) -> None:
        """Take the optimizer step where all numbers are finite."""
        with self.phase("optimizer"):
            self._taken = rollouts, self._step(rollouts)

    def log(self) -> None:
        """Log what the step has measured, once it has ended."""
        rollouts, norm = self._taken
        self.module.log_step(step_metrics(rollouts, self.means, self.timer, norm), self.means, len(rollouts))

    def _step(self, rollouts: Trajectories) -> Tensor:
        """Clip, guard, step; the norm of the gradients."""
        module, means = self.module, self.means.compute()
        optimizer: Any = module.optimizers()
        limit = float("inf") if module.gradient_clip_val is None else module.gradient_clip_val
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(module.student.parameters(), limit))
        problem = what_is_bad(means, norm)
        if self.ranks.largest(problem is not None):
            optimizer.zero_grad()
            refuse_step(module, self.batch, rollouts, means, problem or "not finite on another rank")
            return norm
        module.bad_steps.good()
        optimizer.step()
        optimizer.zero_grad()
        if module.lr_scheduler is not None:
            module.lr_schedulers().step()  # type: ignore[union-attr]
        module.student.count_step()
        module.teacher.on_student_step(module.student)
        use_weights(module)
        return norm


class EvaluationStep(Step):
    """The same without a gradient: what is measured goes into the means of the whole validation."""

    def __init__(self, module: Distiller, batch: Batch, runner: StepRunner) -> None:
        super().__init__(module, batch)
        self._runner, self.means = runner, runner.held_out

    @contextmanager
    def active(self, rollout: Rollout) -> Iterator[None]:
        """The weights stay the same in a validation: they are taken over once, and freed at its end."""
        if not self._runner.is_active:
            self._runner.keep(super().active(rollout))
        yield

    def accumulate(self, losses: Losses, rollouts: Trajectories, weights: Tensor) -> None:
        """Measure all responses."""
        for part, _, counts, _ in self._parts(rollouts, weights):
            self._measure(losses(self, part, None), counts)

    def optimize(self, rollouts: Trajectories) -> None:
        """Nothing is learnt."""


class StepRunner:
    """Makes the steps of a Distiller.

    Attributes:
        held_out: what the validation of this moment has measured.
    """

    def __init__(self) -> None:
        self.held_out = TokenMeans()
        self._validation = ExitStack()
        self.is_active = False

    @contextmanager
    def step(self, module: Distiller, batch: Batch, batch_idx: int) -> Iterator[Step]:
        """A step on a batch: of training, or of the validation that the trainer is in."""
        use_weights(module)
        if not module.trainer.training:
            with self._evaluation(module, batch, batch_idx) as evaluation:
                yield evaluation
            return
        self.finish()  # of a validation that was left by an error
        step = Step(module, batch)
        with step.timer("step"), explain_oom(step.timer, alone=module.trainer.world_size == 1):
            yield step
        step.log()

    @contextmanager
    def _evaluation(self, module: Distiller, batch: Batch, batch_idx: int) -> Iterator[Step]:
        if batch_idx == 0:
            self.finish()
            self.held_out = TokenMeans()
        # The same draws at every validation, and none taken from the generator that training draws from.
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            yield EvaluationStep(module, batch, self)
        module.student.reshard()

    def keep(self, weights: Any) -> None:
        """Enter a context that lasts until the end of the validation."""
        self._validation.enter_context(weights)
        self.is_active = True

    def finish(self) -> None:
        """End a validation: free the weights that it has taken over."""
        self.is_active = False
        self._validation.close()


def use_weights(module: Distiller) -> None:
    """Tell each teacher's prefix cache by which weights it computes from here on."""
    for teacher in module.teacher.parts.values():
        teacher.prefix.use("frozen" if teacher.frozen else module.student.version)
