"""On-policy context distillation as a LightningModule (arXiv:2602.12275).

How a step works:
    1. the rollout writes y for every query of the batch, by default the student without the context: y ~ p_S(. | x)
    2. the teacher, which sees the context, gives its states for every token of y: p_T(. | c, x, y<t)
    3. the student gives its own: p_S(. | x, y<t)
    4. the loss compares the two token by token, by default KL(p_S || p_T) over the whole vocabulary, without logits in
       memory, and its gradient goes through p_S only
    5. one optimizer step follows, however the batch was cut into micro-batches

    opcd fit --config configs/quickstart.yaml
"""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from opcd.accel.cpu.heap import LARGE, give_back, large_blocks_kept
from opcd.accel.precision import warn_if_emulated
from opcd.data import Batch, ContextQueryDataModule
from opcd.losses import Divergence, ReverseKL, SampledReverseKL
from opcd.models import ModelConfig
from opcd.modules.distributed.fsdp_strategy import check_strategy
from opcd.modules.distributed.sharding import whole
from opcd.modules.lm.adapters import Lora, trainable
from opcd.modules.lm.generation import Sampling, computing_dtype, eval_mode, own_precision
from opcd.modules.objective import Objective
from opcd.modules.prefix.prefix_cache import Mode, SharedPrefix
from opcd.modules.rollouts.plain_rollouts import Rollout, StudentRollout
from opcd.modules.step.metrics import SHOWN, UNEVEN, Stopwatch, TokenMeans, step_metrics
from opcd.modules.step.nonfinite import FOLDER, BadNumbers, BadSteps, keep_batch, what_is_bad
from opcd.modules.step.oom import halving, naming_the_knob
from opcd.modules.step.ranks import OnRanks
from opcd.modules.step.rollout_mismatch import Drift
from opcd.modules.step.validation import (
    check_adapter,
    check_data,
    check_engine,
    check_positive,
    check_recorded,
    check_sampled,
    check_scheduler,
    check_served,
    check_shards,
    check_teacher_parts,
    check_weights,
    engines_of,
)
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.model_teachers import FrozenTeacher
from opcd.modules.trajectories import Reduction, Trajectories, token_weights
from opcd.runtime.activity import doing
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import check, leaving_together


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW as in the paper's code, fused."""
    return torch.optim.AdamW(params, lr=5e-6, weight_decay=0.01, fused=True)


class Distiller(OnRanks):
    """Trains a student to answer without the context as the teacher answers with it.

    Args:
        student: the model that is trained, float32 master weights by default.
        teacher: the model that sees the context; FrozenTeacher (the student's own starting weights) if null.
        loss: divergence between student and teacher at every token of the response, in nats.
        rollout: who writes the responses; StudentRollout (the student, without the context) if null.
        adapter: train this in place of the student's own weights, which stay as they are; null trains all of them.
        optimizer: any torch optimizer, over the student's trainable weights. Default: the AdamW of the paper's code.
        lr_scheduler: any torch scheduler that waits for no metric, stepped after every optimizer step; null keeps the
            rate constant.
        temperature: divides the logits of both models inside the loss; the rollout's sampling has its own.
        reduction: sequence averages every response over its own tokens first, then over responses (the paper);
            token averages over all tokens of the step. Micro-batches and ranks do not change either.
        max_nats: clip a token's divergence from above, in nats; its gradient is then zero. null clips nothing.
        micro_batch_tokens: most tokens (rows x longest row) in one forward and backward pass of a model.
        halve_micro_batches: where memory does not suffice, repeat the gradients in micro-batches of half the tokens
            and stay there; on one rank only. Off: the run ends, and the message names what to lower.
        gradient_checkpointing: recompute the student's activations in the backward pass: less memory, more time.
        shared_prefix: keys and values of a context are computed once for all rows, and what the student's rows of a
            pass begin with once for that pass (a sharded student's stay whole): auto compares with the full pass
            first and falls back with one message; always does neither; never runs every row whole.
        prefix_memory_mib: most MiB of keys and values that are kept; the least recently used context goes first.
        gradient_clip_val: most norm of the gradient of a step; null clips nothing.
        bad_numbers: what happens where loss, teacher or gradients are not finite; the optimizer never steps then.
        answer: how answers are drawn that are shown or written (predict, samples); greedy by default.
    """

    def __init__(
        self,
        student: ModelConfig = ModelConfig(),  # noqa: B008
        teacher: Teacher | None = None,
        loss: Divergence | SampledReverseKL = ReverseKL(),  # noqa: B008
        rollout: Rollout | None = None,
        adapter: Lora | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        max_nats: float | None = None,
        micro_batch_tokens: int = 4096,
        halve_micro_batches: bool = False,
        gradient_checkpointing: bool = False,
        shared_prefix: Mode = "auto",
        prefix_memory_mib: int = 2048,
        gradient_clip_val: float | None = 1.0,
        bad_numbers: BadNumbers = BadNumbers(),  # noqa: B008
        answer: Sampling = Sampling(temperature=0.0),  # noqa: B008
    ) -> None:
        super().__init__()
        # One optimizer step takes several backward passes, one a micro-batch: Lightning calls that manual.
        self.automatic_optimization = False
        check_positive(
            temperature=temperature,
            micro_batch_tokens=micro_batch_tokens,
            prefix_memory_mib=prefix_memory_mib,
            max_nats=max_nats,
            gradient_clip_val=gradient_clip_val,
        )
        self.student_config, self.adapter, self.objective = student, adapter, Objective(loss, temperature, max_nats)
        self.teacher, self.rollout = teacher or FrozenTeacher(), rollout or StudentRollout()
        self.teacher.share_prefixes(shared_prefix, prefix_memory_mib)
        self.answering = SharedPrefix(shared_prefix, prefix_memory_mib)
        self.uneven = [*UNEVEN, *(f"divergence/{name}" for name in self.teacher.parts if name is not None)]
        if isinstance(loss, SampledReverseKL):
            check_sampled(loss, self.rollout, temperature)
        self.optimizer, self.lr_scheduler, self._taught = optimizer, lr_scheduler, False
        check_scheduler(optimizer, lr_scheduler)
        self.reduction, self.micro_batch_tokens, self.answer = reduction, micro_batch_tokens, answer
        self.halve_micro_batches = halve_micro_batches
        self.gradient_checkpointing, self.gradient_clip_val = gradient_checkpointing, gradient_clip_val
        # Bytes of a teacher that are worth giving back between the parts of a step; with checkpointing, all are.
        self.least_released = 0 if gradient_checkpointing else LARGE
        self.held_out, self.bad_steps = TokenMeans(), BadSteps(bad_numbers)

    def setup(self, stage: str) -> None:
        """Check what can be known before a model is loaded."""
        if str(self.trainer.precision).startswith("16"):
            raise UserError(
                "trainer.precision: float16 needs loss scaling, which is not here; use bf16-mixed or 32-true"
            )
        if self.halve_micro_batches and self.trainer.world_size > 1:
            raise UserError("model.halve_micro_batches is for one rank, others would wait for it; remove it")
        if str(self.trainer.precision).startswith("bf16"):
            warn_if_emulated("trainer.precision", torch.bfloat16, self.trainer.strategy.root_device)
        check_strategy(self.trainer.strategy)
        check_engine(self.rollout, self.trainer.world_size)
        if stage != "predict":  # no teacher is there
            check_teacher_parts(self.teacher, self.rollout, self.trainer.world_size)
        check_adapter(self.student_config, self.adapter, self.teacher, trains=stage == "fit")
        if self._sharded:
            optimizer = self.optimizer([torch.nn.Parameter(torch.zeros(1, 1))])
            check_shards(self.adapter, self.rollout, self.halve_micro_batches, type(optimizer))
        check_recorded(self.teacher, self.rollout, self.objective.loss, self.objective.temperature)
        for engine in engines_of(self.rollout) if stage != "predict" else []:
            engine.connect()
        check_served(self.teacher, stage, self.rollout, self.objective, self.student_config)
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, ContextQueryDataModule):
            check_data(datamodule, stage, self.rollout, self.answer, self.student_config, self.teacher)

    def configure_model(self) -> None:
        """Load the student and, but for predictions, the teacher; each once."""
        first = not hasattr(self, "student")
        if first:
            device = self.trainer.strategy.root_device
            self.student = Student.load(self.student_config, self.gradient_checkpointing, self.adapter, device)
            self.student.share_beginnings(self.answering.mode)
        if self.trainer.state.fn == "fit" and not trainable(self.student):
            raise UserError(
                f"model.student.name: {self.student_config.name} is an adapter, whose weights are trained no further; "
                f"merge it first: opcd export {self.student_config.name} --to merged --out FOLDER, and train FOLDER"
            )
        if self.trainer.state.fn != "predict" and not self._taught:  # in a notebook, predict may come before fit
            self.teacher.prepare(self.student, self.student_config, self.trainer.strategy.root_device)
            self._taught = True
        if first and self._sharded:
            dtype = computing_dtype(self.trainer.precision, self.student.model.dtype)
            mesh = self.trainer.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
            self.student.shard(mesh, dtype if dtype != self.student.model.dtype else None)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse: a checkpoint is for training that goes on (`UserError`)."""
        raise UserError(
            "a checkpoint holds what training goes on from: Trainer.fit(..., ckpt_path=...), opcd fit --ckpt_path. The "
            "trained model is the folder student/ of its run, for transformers' from_pretrained or model.student.name; "
            "opcd export RUN --to hf --out FOLDER writes one out of a checkpoint"
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's trainable weights, and the scheduler if there is one."""
        optimizer = self.optimizer(p for p in self.student.parameters() if p.requires_grad)
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        steps, most = self.trainer.estimated_stepping_batches, getattr(scheduler, "total_steps", None)
        if most is not None and steps > most:
            raise UserError(
                f"model.lr_scheduler: {type(scheduler).__name__} is made for {most} steps (total_steps), and the "
                f"trainer takes {steps}; give both the same number (trainer.max_steps)"
            )
        return [optimizer], [scheduler]

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step on one batch of queries."""
        clock = Stopwatch(self.device)
        with clock("step"), naming_the_knob(clock, alone=self.trainer.world_size == 1):
            with clock("sync"), leaving_together(self._largest):
                self.rollout.synchronise(self.student)
                self.teacher.synchronise(self.student)
            with clock("rollout"), leaving_together(self._largest):
                trajectories = self.rollout.sample(self.student, self.teacher, batch)
                self.rollout.release()
                self.student.release()
            with clock("teacher"), leaving_together(self._largest):
                self.teacher.ask(trajectories)
            means = self._gradients_that_fit(trajectories, clock)
            with clock("optimizer"):
                gradient_norm = self._optimizer_step(batch, trajectories, means.compute())
        self._log_step(trajectories, means, clock, gradient_norm)

    def _gradients_that_fit(self, trajectories: Trajectories, clock: Stopwatch) -> TokenMeans:
        """`_gradients`; in smaller micro-batches where memory does not suffice and `halve_micro_batches` says so."""
        run = partial(self._gradients, trajectories, clock)
        if not self.halve_micro_batches:
            return run(self.micro_batch_tokens)
        undo = self.optimizers().zero_grad  # type: ignore[union-attr]
        means, self.micro_batch_tokens = halving(run, undo, self.micro_batch_tokens, trajectories.longest)
        return means

    def _gradients(self, trajectories: Trajectories, clock: Stopwatch, max_tokens: int) -> TokenMeans:
        """Teacher, student and loss over all responses, a micro-batch at a time; gradients add up in the student."""
        means, least = TokenMeans(), self.least_released
        weights = token_weights(trajectories.lengths, self.reduction, self._all_sum)
        micro_batches = self._in_step(trajectories.micro_batches(max_tokens), self._gathering)
        for number, (rows, counts) in enumerate(micro_batches, start=1):
            check()
            part = trajectories.select(rows)
            with clock("teacher"):
                target = self.teacher.score(part, max_tokens)
                self.teacher.release(least)
            with clock("student"):
                states = self.student.score(part)
                self.student.release()
            # With checkpointing, holes that kept blocks leave between gradients cost more than new pages do.
            with clock("loss"), nullcontext() if self.gradient_checkpointing else large_blocks_kept():
                measured = means if counts else TokenMeans()
                share = self._share(weights[rows] * counts, part, self.student.model.dtype)
                if (drift := Drift.of(states, part)) is not None:
                    measured.add({"rollout_gap": drift.gap})
                    if (limit := self.rollout.max_importance) is not None:
                        share = share * drift.importance(limit)
                values = self.objective(states, target, part, share)
                measured.add(values)
                self.teacher.release(least)  # its head, which the loss has read
                self.student.release()
            with clock("student"):
                self._backward((values["divergence"] * share).sum(), last=number == len(micro_batches))
        return means

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Divergence on rollouts of held-out queries."""
        if batch_idx == 0:
            self.held_out = TokenMeans()
        # The same draws at every validation, and none taken from the generator that training draws from.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(batch_idx)
            with leaving_together(self._largest):
                self.rollout.synchronise(self.student)
                self.teacher.synchronise(self.student)
            with leaving_together(self._largest):
                trajectories = self.rollout.sample(self.student, self.teacher, batch)
                self.rollout.release()
        with leaving_together(self._largest):
            self.teacher.ask(trajectories)
        for rows, counts in self._in_step(trajectories.micro_batches(self.micro_batch_tokens), self._gathering):
            part = trajectories.select(rows)
            target = self.teacher.score(part, self.micro_batch_tokens)
            measured = self.held_out if counts else TokenMeans()
            measured.add(self.objective(self.student.score(part), target, part))
        self.student.reshard()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """As `validation_step`, on the test queries."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the divergence of all batches, and of several teachers that of each."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """As `on_validation_epoch_end`."""
        self._log_held_out("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """A row a query: the student's answer without the context, and with it where there is one (else null)."""
        answers = self.answers(batch, context=False)
        there = [row for row, context in enumerate(batch.contexts) if context is not None]
        informed: dict[int, str] = {}
        if there:
            informed = dict(zip(there, self.answers(batch.select(there), context=True), strict=True))
        return [
            {
                "source": example.source,
                "query": example.query,
                "reference": example.reference,
                "answer": answer,
                "answer_with_context": informed.get(number),
            }
            for number, (example, answer) in enumerate(zip(batch.examples, answers, strict=True))
        ]

    def answers(self, batch: Batch, context: bool, what: str = "answers") -> list[str]:
        """The student's answers as `answer` draws them, with the context in the prompt or without.

        `what` they are is shown while they are written.

        They compute in the trainer's precision, whoever asks: a callback is outside of Lightning's autocast.
        """
        with self.trainer.precision_plugin.forward_context():
            return self._answers(batch, context, what + " with the context" * context)

    def _answers(self, batch: Batch, context: bool, what: str) -> list[str]:
        student, tokens = self.student, 0

        def told(rows: Tensor, _: Tensor) -> None:
            """Count what is done: an answer that has ended gets no more tokens."""
            nonlocal tokens
            tokens += 1
            doing(
                what, f"{len(batch) - len(rows)}/{len(batch)}, {tokens} of at most {self.answer.max_new_tokens} tokens"
            )

        doing(what, f"0/{len(batch)}")
        if student.is_sharded:
            student = student.plain(computing_dtype(self.trainer.precision, student.model.dtype))
        if not context:
            return student.answer(batch.student_prompts, self.answer, told=told)
        model = student.model
        with torch.no_grad(), eval_mode(model), own_precision(model):
            prefixes = self.answering.encoded(model, batch.teacher_prefixes, batch.teacher_prompts)
        return student.answer(batch.teacher_prompts, self.answer, prefixes, told)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's state where it cannot be loaded again; a frozen teacher stays out."""
        give_back()  # Lightning builds the file in memory: a copy of weights and optimizer
        if state := self.teacher.state_dict():
            checkpoint["teacher"] = state
        checkpoint["bad_steps"] = [self.bad_steps.total, self.bad_steps.in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give the teacher its state back, and let the student take float64 weights as they are (`64-true`).

        Raises:
            UserError: the weights are of another student.
        """
        check_weights(checkpoint["state_dict"], self.state_dict(), str(self.trainer.ckpt_path))
        if next(iter(checkpoint["state_dict"].values())).dtype == torch.float64:
            self.student.double()  # Lightning converts after it has loaded
        self.bad_steps.total, self.bad_steps.in_a_row = checkpoint.get("bad_steps", (0, 0))
        if "teacher" in checkpoint:
            self.teacher.load_state_dict(checkpoint["teacher"])

    @property
    def _gathering(self) -> bool:
        """Whether ranks gather weights of the student or the teacher from one another."""
        return self._sharded or self.teacher.shard

    def _optimizer_step(self, batch: Batch, trajectories: Trajectories, means: dict[str, float]) -> Tensor:
        """Step where all numbers are finite; the norm of the gradients."""
        optimizer = self.optimizers()
        limit = float("inf") if self.gradient_clip_val is None else self.gradient_clip_val
        norm = whole(torch.nn.utils.clip_grad_norm_(self.student.parameters(), limit))
        problem = what_is_bad(means, norm)
        if self._largest(problem is not None):
            optimizer.zero_grad()  # type: ignore[union-attr]
            self._refuse_step(batch, trajectories, means, problem or "not finite on another rank")
            return norm
        self.bad_steps.good()
        optimizer.step()  # type: ignore[union-attr]
        optimizer.zero_grad()  # type: ignore[union-attr]
        if self.lr_scheduler is not None:
            self.lr_schedulers().step()  # type: ignore[union-attr]
        self.teacher.after_step(self.student)
        self.answering.clear()
        self.student.release()
        return norm

    def _refuse_step(self, batch: Batch, trajectories: Trajectories, means: dict[str, float], problem: str) -> None:
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / FOLDER
        file = folder / f"step={self.trainer.global_step}-bad={self.bad_steps.total}-rank={self.global_rank}.json"
        keep_batch(file, batch, trajectories, problem, means)
        self.bad_steps.bad(self.trainer.global_step, problem, file)

    def _log_held_out(self, split: str) -> None:
        for name, value in self.held_out.over_ranks(self.uneven, self._all_sum).items():
            self.log(f"{split}/{name}", value, prog_bar=True, sync_dist=self.trainer.world_size > 1)

    def _log_step(self, trajectories: Trajectories, means: TokenMeans, clock: Stopwatch, gradient_norm: Tensor) -> None:
        logged = step_metrics(trajectories, means, clock, gradient_norm) | {"train/bad_steps": self.bad_steps.total}
        logged |= {f"train/{name}": value for name, value in means.over_ranks(self.uneven, self._all_sum).items()}
        several = self.trainer.world_size > 1
        for name, value in logged.items():
            self.log(name, value, prog_bar=name in SHOWN, batch_size=len(trajectories), sync_dist=several)
