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

from typing import Any, NoReturn

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from opcd.accel import accelerator
from opcd.accel.precision import warn_if_emulated
from opcd.data import Batch
from opcd.losses import Loss, ReverseKL
from opcd.models import ModelConfig
from opcd.modules.lm.adapters import Lora, trainable
from opcd.modules.lm.generation import Sampling, computing_dtype, eval_mode, own_precision
from opcd.modules.objective import Objective
from opcd.modules.prefix.prefix_cache import Mode, PrefixCache
from opcd.modules.rollouts.base import Rollout
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.step.metrics import SHOWN, UNEVEN, TokenMeans
from opcd.modules.step.nonfinite import BadSteps, OnNonfinite
from opcd.modules.step.ranks import Ranks, is_sharded
from opcd.modules.step.runner import Step, StepRunner
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.teachers.model_teachers import FrozenTeacher
from opcd.modules.trajectories import Reduction, Trajectories, token_weights
from opcd.modules.validation import Run, check_on_policy, check_positive, check_scheduler, check_weights, validate
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import doing


def default_optimizer(params: Any) -> torch.optim.Optimizer:
    """AdamW as in the paper's code, fused."""
    return torch.optim.AdamW(params, lr=5e-6, weight_decay=0.01, fused=True)


class Distiller(LightningModule):
    """Trains a student to answer without the context as the teacher answers with it.

    Args:
        student: the model that is trained, float32 master weights by default.
        teacher: the model that sees the context; FrozenTeacher (the student's own starting weights) if null.
        loss: what is compared at every token of the response, in nats; ReverseKL if null.
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
        shrink_on_oom: where memory does not suffice, repeat the gradients in micro-batches of half the tokens
            and stay there; on one rank only. Off: the run ends, and the message names what to lower.
        gradient_checkpointing: recompute the student's activations in the backward pass: less memory, more time.
        shared_prefix: keys and values of a context are computed once for all rows, and what the student's rows of a
            pass begin with once for that pass (a sharded student's stay whole): auto compares with the full pass
            first and falls back with one message; always does neither; never runs every row whole.
        prefix_memory_mib: most MiB of keys and values that are kept; the least recently used context goes first.
        gradient_clip_val: most norm of the gradient of a step; null clips nothing.
        on_nonfinite: what happens where loss, teacher or gradients are not finite; the optimizer never steps then.
        eval_sampling: how answers are drawn that are shown or written (predict, samples); greedy by default.
    """

    def __init__(
        self,
        student: ModelConfig = ModelConfig(),  # noqa: B008
        teacher: Teacher | None = None,
        loss: Loss | None = ReverseKL(),  # noqa: B008
        rollout: Rollout | None = None,
        adapter: Lora | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        max_nats: float | None = None,
        micro_batch_tokens: int = 4096,
        shrink_on_oom: bool = False,
        gradient_checkpointing: bool = False,
        shared_prefix: Mode = "auto",
        prefix_memory_mib: int = 2048,
        gradient_clip_val: float | None = 1.0,
        on_nonfinite: OnNonfinite = OnNonfinite(),  # noqa: B008
        eval_sampling: Sampling = Sampling(temperature=0.0),  # noqa: B008
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
        self.student_config, self.adapter = student, adapter
        self.teacher, self.rollout = teacher or FrozenTeacher(), rollout or StudentRollout()
        loss = loss or ReverseKL()
        self.objective = Objective(loss, temperature, max_nats, self.rollout.importance_clip)
        self.teacher.share_contexts(shared_prefix, prefix_memory_mib)
        self.answering = PrefixCache(shared_prefix, prefix_memory_mib)
        self.uneven = [*UNEVEN, *(f"divergence/{name}" for name in self.teacher.parts if name is not None)]
        check_on_policy(loss, self.rollout, temperature)
        self.optimizer, self.lr_scheduler, self._taught = optimizer, lr_scheduler, False
        check_scheduler(optimizer, lr_scheduler)
        self.reduction, self.micro_batch_tokens, self.eval_sampling = reduction, micro_batch_tokens, eval_sampling
        self.shrink_on_oom = shrink_on_oom
        self.gradient_checkpointing, self.gradient_clip_val = gradient_checkpointing, gradient_clip_val
        self.runner, self.bad_steps = StepRunner(), BadSteps(on_nonfinite)

    def setup(self, stage: str) -> None:
        """Check what can be known before a model is loaded."""
        validate(Run.of(self, self.trainer, getattr(self.trainer, "datamodule", None), stage))
        if str(self.trainer.precision).startswith("bf16"):
            warn_if_emulated("trainer.precision", torch.bfloat16, self.trainer.strategy.root_device)

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
            self.teacher.setup(self.student, self.student_config, self.trainer.strategy.root_device)
            self._taught = True
        if first and is_sharded(self.trainer):
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
        """One optimizer step on one batch of queries; a validation takes the same way without a gradient."""
        with self.runner.step(self, batch, batch_idx) as step:
            with step.active(self.rollout):  # it has this step's weights
                rollouts = step.generate(self.rollout)  # y ~ p_S(. | x), without gradient
            weights = token_weights(rollouts.lengths, self.reduction, step.all_sum)  # their sum over the step is 1
            with step.session(self.teacher, rollouts):
                step.accumulate(self.losses, rollouts, weights)
            step.optimize(rollouts)

    def losses(self, step: Step, part: Trajectories, weights: Tensor | None) -> dict[str, Tensor]:
        """Compare student and teacher at every response token of a micro-batch: see `Objective`."""
        target = step.run("teacher", self.teacher.score, part, step.max_tokens)  # p_T(. | c, x, y<t)
        states = step.run("student", self.student.score, part)  # p_S(. | x, y<t)
        return step.run("loss", self.objective, states, target, part, weights)

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the divergence on rollouts of held-out queries."""
        self.training_step(batch, batch_idx)

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
        """The student's answers as `eval_sampling` draws them, with the context in the prompt or without.

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
            most = self.eval_sampling.max_new_tokens
            doing(what, f"{len(batch) - len(rows)}/{len(batch)}, {tokens} of at most {most} tokens")

        doing(what, f"0/{len(batch)}")
        if student.is_sharded:
            student = student.plain(computing_dtype(self.trainer.precision, student.model.dtype))
        if not context:
            return student.answer(batch.student_prompts, self.eval_sampling, told=told)
        model = student.model
        with torch.no_grad(), eval_mode(model), own_precision(model):
            self.answering.use(self.student.version)
            prefixes = self.answering.encoded(model, batch.teacher_prefixes, batch.teacher_prompts)
        return student.answer(batch.teacher_prompts, self.eval_sampling, prefixes, told)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the teacher's state where it cannot be loaded again; a frozen teacher stays out."""
        accelerator(self.device).trim()  # Lightning builds the file in memory: a copy of weights and optimizer
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
        self.student.count_step()  # its weights are others now

    def log_step(self, logged: dict[str, float], means: TokenMeans, rows: int) -> None:
        """Log what a step has measured: `logged` by whole names, and of `means` what some ranks may lack."""
        all_sum, several = Ranks(self.trainer, self.device).all_sum, self.trainer.world_size > 1
        logged = logged | {"train/bad_steps": self.bad_steps.total}
        logged |= {f"train/{name}": value for name, value in means.over_ranks(self.uneven, all_sum).items()}
        for name, value in logged.items():
            self.log(name, value, prog_bar=name in SHOWN, batch_size=rows, sync_dist=several)

    def _log_held_out(self, split: str) -> None:
        self.runner.finish()
        all_sum = Ranks(self.trainer, self.device).all_sum
        for name, value in self.runner.held_out.over_ranks(self.uneven, all_sum).items():
            self.log(f"{split}/{name}", value, prog_bar=True, sync_dist=self.trainer.world_size > 1)
