"""What surrounds the algorithm in a step: timing, memory, signals, ranks, values that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from opcd.accel import accelerator
from opcd.data import Batch
from opcd.modules.distributed.fsdp_strategy import FSDP2Strategy
from opcd.modules.distributed.sharding import full_tensor
from opcd.modules.rollouts.base import Rollout
from opcd.modules.step.failures import explain_oom, keep_batch, shrinking, what_is_bad
from opcd.modules.step.metrics import SHOWN, PhaseTimer, TokenMeans, step_metrics
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.interruption import check, leaving_together

if TYPE_CHECKING:
    from opcd.modules.distiller import Distiller

Result = TypeVar("Result")
Losses = Callable[["Step", Trajectories, Tensor | None], dict[str, Tensor]]
"""The values of a micro-batch by name, given the weight of each of its tokens [N]: see `Objective`."""


def is_sharded(trainer: Trainer) -> bool:
    """Whether the student of this run is sharded: only in training, because generation needs all weights."""
    return isinstance(trainer.strategy, FSDP2Strategy) and trainer.state.fn == "fit"


class Ranks:
    """The communication between the ranks of a run.

    Args:
        trainer: its strategy connects the ranks.
        device: of this rank.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._strategy: Any = trainer.strategy
        self._device, self.number = device, trainer.world_size

    def backward(self, module: LightningModule, loss: Tensor, last: bool) -> None:
        """Run one of several backward passes; the ranks add up their gradients after the last one."""
        if last or not isinstance(self._strategy, ParallelStrategy):
            module.manual_backward(loss)
        else:
            with self._strategy.block_backward_sync():
                module.manual_backward(loss)

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; every rank must call this."""
        if self.number == 1:
            return number
        return int(self._strategy.reduce(torch.tensor(number, device=self._device), reduce_op="max"))

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks; every rank must call this."""
        found: Tensor = self._strategy.reduce(value.to(self._device), reduce_op="sum")
        return found


class Step:
    """One step of training: runs the parts that the algorithm names.

    Attributes:
        max_tokens: most tokens of one forward pass of a model.
        means: the means over tokens of what was measured.
    """

    def __init__(self, module: Distiller, batch: Batch) -> None:
        self.module, self.batch = module, batch
        self.max_tokens, self.means = module.micro_batch_tokens, TokenMeans()
        self.timer, self.ranks = PhaseTimer(module.device), Ranks(module.trainer, module.device)
        self.all_sum = self.ranks.all_sum
        self._accelerator = accelerator(module.device)
        self._idle = module.teacher.idle_weights
        self._taken: tuple[Trajectories, Tensor]

    def run(self, name: str, function: Callable[..., Result], *args: Any) -> Result:
        """The result of one phase of the step, which is timed; its memory is freed for the next phase."""
        recompute = self.module.gradient_checkpointing
        with self.timer(name), self._accelerator.phase(name, recompute, self._idle):
            result = function(*args)
            if recompute:
                torch.clear_autocast_cache()  # low-precision copies of weights; they are made again when needed
            return result

    @contextmanager
    def active(self, rollout: Rollout) -> Iterator[None]:
        """Within, the rollout (and the teacher) has the student's weights of this step."""
        with self._accelerator.phase("sync", self.module.gradient_checkpointing, []), ExitStack() as weights:
            with self.timer("sync"), leaving_together(self.ranks.largest):
                weights.enter_context(rollout.active(self.module.student))
                self.module.teacher.sync_weights(self.module.student)
            yield

    def generate(self, rollout: Rollout) -> Trajectories:
        """The responses to the batch; if one rank has to stop, all ranks stop."""
        with self.timer("rollout"), leaving_together(self.ranks.largest):
            return rollout.generate(self.module.student, self.module.teacher, self.batch)

    @contextmanager
    def session(self, teacher: Teacher, rollouts: Trajectories) -> Iterator[None]:
        """Within, the teacher scores these responses."""
        with ExitStack() as session:
            with self.timer("teacher"), leaving_together(self.ranks.largest):
                session.enter_context(teacher.session(rollouts))
            yield

    def accumulate(self, losses: Losses, rollouts: Trajectories, weights: Tensor) -> None:
        """Add up the gradients of all responses in the student, one micro-batch at a time.

        Args:
            losses: the values of one micro-batch, with its loss.
            rollouts: of the whole step.
            weights: the weight of one token of each response in the loss of the step, [B].
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
        """Each micro-batch, its tokens' weights in this rank's loss [N], whether it counts, and whether it is the last.

        Ranks that gather weights from one another must make equally many passes. A rank with fewer micro-batches
        repeats its shortest row, which does not count. A signal to stop is noticed here.
        """
        module, passes = self.module, [(rows, True) for rows in rollouts.micro_batches(self.max_tokens)]
        if is_sharded(module.trainer) or module.teacher.shard:
            passes += [(passes[-1][0][-1:], False)] * (self.ranks.largest(len(passes)) - len(passes))
        dtype = torch.promote_types(module.student.model.dtype, torch.float32)  # that of the divergence
        for number, (rows, counts) in enumerate(passes, start=1):
            check()
            part = rollouts.select(rows)
            share = (weights[rows] * counts).repeat_interleave(part.lengths).to(module.device, dtype)
            # DDP averages gradients over ranks, but the weights sum to 1 over all ranks: undo the average.
            yield part, share * self.ranks.number, counts, number == len(passes)

    def _measure(self, values: dict[str, Tensor], counts: bool) -> None:
        if counts:
            self.means.add({name: value for name, value in values.items() if name != "loss"})

    def optimize(self, rollouts: Trajectories) -> None:
        """Take the optimizer step if all values are finite."""
        self._taken = rollouts, self.run("optimizer", self._step, rollouts)

    def log(self) -> None:
        """Log the metrics of the step, once it has ended."""
        module, (rollouts, norm) = self.module, self._taken
        logged = step_metrics(rollouts, self.means, self.timer, norm) | {"train/bad_steps": module.bad_steps.total}
        means = self.means.over_ranks(module.uneven, self.all_sum)  # those that some ranks may lack
        logged |= {f"train/{name}": value for name, value in means.items()}
        several = self.ranks.number > 1
        for name, value in logged.items():
            module.log(name, value, prog_bar=name in SHOWN, batch_size=len(rollouts), sync_dist=several)

    def _step(self, rollouts: Trajectories) -> Tensor:
        """Clip the gradients, check them, step; return the norm of the gradients."""
        module, trainer, means = self.module, self.module.trainer, self.means.compute()
        optimizer: Any = module.optimizers()
        limit = float("inf") if module.gradient_clip_val is None else module.gradient_clip_val
        norm = full_tensor(torch.nn.utils.clip_grad_norm_(module.student.parameters(), limit))
        problem = what_is_bad(means, norm)
        if self.ranks.largest(problem is not None):
            optimizer.zero_grad()
            problem = problem or "not finite on another rank"
            name = f"step={trainer.global_step}-bad={module.bad_steps.total}-rank={module.global_rank}.json"
            file = Path(trainer.log_dir or trainer.default_root_dir) / "bad_batches" / name
            keep_batch(file, self.batch, rollouts, problem, means)
            module.bad_steps.bad(trainer.global_step, problem, file)
            return norm
        module.bad_steps.in_a_row = 0
        optimizer.step()
        optimizer.zero_grad()
        if module.lr_scheduler is not None:
            module.lr_schedulers().step()  # type: ignore[union-attr]
        module.student.count_step()
        module.teacher.on_student_step(module.student)
        use_weights(module)
        return norm


class EvaluationStep(Step):
    """The same step without gradients; its values go into the means of the whole validation."""

    def __init__(self, module: Distiller, batch: Batch, runner: StepRunner) -> None:
        super().__init__(module, batch)
        self._runner, self.means = runner, runner.held_out

    @contextmanager
    def active(self, rollout: Rollout) -> Iterator[None]:
        """The weights do not change in a validation: they are copied once, and freed at its end."""
        if not self._runner.is_active:
            self._runner.validation.enter_context(super().active(rollout))
            self._runner.is_active = True
        yield

    def accumulate(self, losses: Losses, rollouts: Trajectories, weights: Tensor) -> None:
        for part, _, counts, _ in self._parts(rollouts, weights):
            self._measure(losses(self, part, None), counts)

    def optimize(self, rollouts: Trajectories) -> None:
        """Keep the weights as they are."""


class StepRunner:
    """Makes the steps of a Distiller.

    Attributes:
        held_out: the means of the current validation.
        validation: the contexts that end with the current validation.
        is_active: whether the rollout has its weights for the current validation.
    """

    def __init__(self) -> None:
        self.held_out, self.validation, self.is_active = TokenMeans(), ExitStack(), False

    @contextmanager
    def step(self, module: Distiller, batch: Batch, batch_idx: int) -> Iterator[Step]:
        """A step on a batch: of training, or of the validation that the trainer is in."""
        use_weights(module)
        if not module.trainer.training:
            with self._evaluation(module, batch, batch_idx) as evaluation:
                yield evaluation
            return
        self.finish()  # a validation that an error has ended
        step = Step(module, batch)
        with step.timer("step"), explain_oom(step.timer, alone=module.trainer.world_size == 1):
            yield step
        step.log()

    @contextmanager
    def _evaluation(self, module: Distiller, batch: Batch, batch_idx: int) -> Iterator[Step]:
        if batch_idx == 0:
            self.finish()
            self.held_out = TokenMeans()
        # Every validation draws the same numbers, and leaves the generator of the training alone.
        with torch.random.fork_rng(devices=[module.device] if module.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            yield EvaluationStep(module, batch, self)
        module.student.reshard()

    def finish(self) -> None:
        """End a validation and free its copy of the weights."""
        self.is_active = False
        self.validation.close()


def use_weights(module: Distiller) -> None:
    """Tell each teacher's prefix cache the version of the weights that it computes with from now on."""
    for teacher in module.teacher.parts.values():
        teacher.prefix.use("frozen" if teacher.frozen else module.student.version)
