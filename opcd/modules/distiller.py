"""On-policy context distillation as a LightningModule (arXiv:2602.12275).

How a step works:
    1. the rollout writes y for every query of the batch, by default the student without the context: y ~ p_S(. | x)
    2. the teacher, which sees the context, computes its states for every token of y: p_T(. | c, x, y<t)
    3. the student computes its own states: p_S(. | x, y<t)
    4. the loss compares the two token by token, by default KL(p_S || p_T) over the whole vocabulary, without logits in
       memory; its gradient goes through p_S only
    5. one optimizer step follows, whatever the number of micro-batches

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
from opcd.data.example import ANCHORS
from opcd.losses import Loss, ReverseKL
from opcd.models import ModelConfig
from opcd.modules.endings import Endings, merged_ends
from opcd.modules.lm.adapters import Lora, trainable
from opcd.modules.lm.cartridge import Cartridge, context_start
from opcd.modules.lm.generation import Sampling, computing_dtype
from opcd.modules.objective import Objective
from opcd.modules.prefix.prefix_cache import Mode, PrefixCache
from opcd.modules.rollouts.base import Rollout
from opcd.modules.rollouts.student_rollout import StudentRollout
from opcd.modules.step.failures import BadSteps, OnNonfinite
from opcd.modules.step.metrics import UNEVEN
from opcd.modules.step.runner import Ranks, Step, StepRunner, is_sharded
from opcd.modules.student import Student
from opcd.modules.teachers.anchored_teachers import with_anchors
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
        loss: the divergence at every token of the response, in nats; ReverseKL if null.
        rollout: what writes the responses; StudentRollout (the student, without the context) if null.
        adapter: train this adapter and freeze the student's own weights; null trains the weights themselves. Lora:
            low-rank matrices beside the weights; Cartridge: a prefix of keys and values, which begins as the context's.
        optimizer: any torch optimizer, over the student's trainable weights. Default: the AdamW of the paper's code.
        lr_scheduler: any torch scheduler that needs no metric, stepped after every optimizer step; null keeps the
            learning rate constant.
        temperature: divides the logits of both models inside the loss; the rollout's sampling has its own.
        reduction: sequence averages each response over its own tokens, then over the responses (the paper);
            token averages over all tokens of the step. Both are independent of micro-batches and ranks.
        merge_end_tokens: count all end-of-sequence tokens of student and teacher as one outcome in the loss. For models
            that end with different tokens; generation stops where it did.
        max_nats: clip a token's divergence from above, in nats; its gradient is then zero. null: no clipping.
        micro_batch_tokens: most tokens (rows x longest row) in one forward and backward pass of a model.
        shrink_on_oom: on out-of-memory, retry the step with half the micro-batch size and keep it (single rank only).
            If false, the run ends with a message that names what to lower.
        gradient_checkpointing: recompute the student's activations in the backward pass: less memory, more time.
        shared_prefix: prefix caching. The teacher's keys and values of a context are computed once for all rows; the
            tokens that all student rows of a pass begin with, once per pass (not for a sharded student). auto: compare
            with the full forward pass first, fall back with a warning; always: do not compare; never: off.
        prefix_memory_mib: most MiB of keys and values that are cached; the least recently used context is dropped.
        gradient_clip_val: largest norm of a step's gradient; null: no clipping.
        on_nonfinite: what happens if the loss, the teacher or the gradients are not finite. The optimizer never steps.
        eval_sampling: sampling of answers that are shown or written (predict, samples); greedy by default.
    """

    def __init__(
        self,
        student: ModelConfig = ModelConfig(),  # noqa: B008
        teacher: Teacher | None = None,
        loss: Loss | None = ReverseKL(),  # noqa: B008
        rollout: Rollout | None = None,
        adapter: Lora | Cartridge | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        lr_scheduler: LRSchedulerCallable | None = None,
        temperature: float = 1.0,
        reduction: Reduction = "sequence",
        merge_end_tokens: bool = False,
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
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self._taught: Teacher | None = None
        check_scheduler(optimizer, lr_scheduler)
        self.merge_end_tokens = merge_end_tokens
        self._endings: Endings | None = None
        self.reduction, self.micro_batch_tokens, self.eval_sampling = reduction, micro_batch_tokens, eval_sampling
        self.shrink_on_oom = shrink_on_oom
        self.gradient_checkpointing, self.gradient_clip_val = gradient_checkpointing, gradient_clip_val
        self.runner, self.bad_steps = StepRunner(), BadSteps(on_nonfinite)

    def setup(self, stage: str) -> None:
        """Check the run before a model is loaded, and add the teacher of `data.anchors`."""
        run = Run.of(self, self.trainer, getattr(self.trainer, "datamodule", None), stage)
        validate(run)
        anchored = stage == "fit" and run.data is not None and run.data.anchors is not None
        if anchored and ANCHORS not in self.teacher.parts:
            self.teacher = with_anchors(self.teacher, self.student_config, self.adapter is not None)
            self.uneven.append(f"divergence/{ANCHORS}")
        if str(self.trainer.precision).startswith("bf16"):
            warn_if_emulated("trainer.precision", torch.bfloat16, self.trainer.strategy.root_device)

    def configure_model(self) -> None:
        """Load the student and, except for predictions, the teacher; each once."""
        first = not hasattr(self, "student")
        if first:
            device = self.trainer.strategy.root_device
            self.student = Student.load(
                self.student_config, self.gradient_checkpointing, self.adapter, device, self._context()
            )
            self.student.share_beginnings(self.answering.mode)
        if self.trainer.state.fn == "fit" and not trainable(self.student):
            raise UserError(
                f"model.student.name: {self.student_config.name} is an adapter, which cannot be trained further; "
                f"merge it first: opcd export {self.student_config.name} --to merged --out FOLDER, and train FOLDER; "
                "a Cartridge cannot be merged: train another one over its base"
            )
        # In a notebook, predict may come before fit.
        if self.trainer.state.fn != "predict" and self._taught is not self.teacher:
            self.teacher.setup(self.student, self.student_config, self.trainer.strategy.root_device)
            self._taught = self.teacher
            if self.merge_end_tokens:
                self.objective.merged = merged_ends(self.student, self.teacher)
        if first and is_sharded(self.trainer):
            dtype = computing_dtype(self.trainer.precision, self.student.model.dtype)
            mesh = self.trainer.strategy.device_mesh["data_parallel"]  # type: ignore[attr-defined]
            self.student.shard(mesh, dtype if dtype != self.student.model.dtype else None)

    def _context(self) -> Tensor | None:
        """The tokens that a Cartridge begins as; None without one, and where a checkpoint brings a trained one."""
        if not isinstance(self.adapter, Cartridge) or (self.trainer.state.fn != "fit" and self.trainer.ckpt_path):
            return None
        return context_start(getattr(self.trainer, "datamodule", None), self.adapter)

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise a UserError: a checkpoint is for resuming a training."""
        raise UserError(
            "a checkpoint is for resuming a training: Trainer.fit(..., ckpt_path=...), opcd fit --ckpt_path. The "
            "trained model is the folder student/ of its run, for transformers' from_pretrained or model.student.name; "
            "opcd export RUN --to hf --out FOLDER writes a checkpoint's model"
        )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer over the student's trainable weights, and the scheduler, if set."""
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

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Look at how the responses of the run's first step end."""
        if self.trainer.global_step == 0 and batch_idx == 0 and not is_sharded(self.trainer):
            self._endings = Endings(self.student, self.teacher, batch.views, self.merge_end_tokens)

    def on_train_batch_end(self, *args: Any) -> None:
        """Warn if student and teacher end responses differently."""
        if self._endings is not None:
            self._endings.warn()
            self._endings = None

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Take one optimizer step on one batch of queries; a validation runs the same lines without gradients."""
        with self.runner.step(self, batch, batch_idx) as step:
            with step.active(self.rollout):  # with this step's weights
                rollouts = step.generate(self.rollout)  # y ~ p_S(. | x), without gradient
            weights = token_weights(
                rollouts.lengths, self.reduction, step.all_sum
            )  # the tokens' sum to 1 over the step
            with step.session(self.teacher, rollouts):
                step.accumulate(self.losses, rollouts, weights)
            step.optimize(rollouts)

    def losses(self, step: Step, part: Trajectories, weights: Tensor | None) -> dict[str, Tensor]:
        """Compare student and teacher at every response token of a micro-batch: see `Objective`."""
        target = step.run("teacher", self.teacher.score, part, step.max_tokens)  # p_T(. | c, x, y<t)
        states = step.run("student", self.student.score, part)  # p_S(. | x, y<t)
        values = step.run("loss", self.objective, states, target, part, weights)
        if self._endings is not None and weights is not None:
            self._endings.add(states, target, part)
        return values

    @torch.no_grad()
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the divergence on responses to held-out queries."""
        self.training_step(batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Measure the divergence on responses to the test queries."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Log the divergence over all batches, and that of each teacher if there are several."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the same for the test queries."""
        self._log_held_out("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """One row per query: the student's answer without the context, and with the context (null if there is none)."""
        answers = self.answers(batch, context=False)
        informed = [row for row, context in enumerate(batch.contexts) if context is not None]
        with_context = self.answers(batch.select(informed), context=True) if informed else []
        found = dict(zip(informed, with_context, strict=True))
        return [
            {
                "source": example.source,
                "query": example.query,
                "reference": example.reference,
                "answer": answer,
                "answer_with_context": found.get(number),
            }
            for number, (example, answer) in enumerate(zip(batch.examples, answers, strict=True))
        ]

    def answers(self, batch: Batch, context: bool, what: str = "answers") -> list[str]:
        """The student's answers, drawn with `eval_sampling`, with the context in the prompt or without.

        `what` is their name in the progress display.
        """
        student, tokens, what = self.student, 0, what + " with the context" * context

        def told(rows: Tensor, _: Tensor) -> None:
            """Show the progress: an answer that has ended gets no more tokens."""
            nonlocal tokens
            tokens += 1
            most = self.eval_sampling.max_new_tokens
            doing(what, f"{len(batch) - len(rows)}/{len(batch)}, {tokens} of at most {most} tokens")

        doing(what, f"0/{len(batch)}")
        with self.trainer.precision_plugin.forward_context():  # a callback is outside of Lightning's autocast
            if student.is_sharded:
                student = student.plain(computing_dtype(self.trainer.precision, student.model.dtype))
            if not context:
                return student.answer(batch.student_prompts, self.eval_sampling, told=told)
            self.answering.use(self.student.version)
            prefixes = self.answering.encoded(student.model, batch.teacher_prefixes, batch.teacher_prompts)
            return student.answer(batch.teacher_prompts, self.eval_sampling, prefixes, told)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of a teacher that cannot be loaded again."""
        accelerator(self.device).trim()  # Lightning builds the file in memory: a copy of weights and optimizer
        if state := self.teacher.state_dict():
            checkpoint["teacher"] = state
        checkpoint["bad_steps"] = [self.bad_steps.total, self.bad_steps.in_a_row]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the teacher's state, and keep the student's float64 weights (`64-true`).

        Raises:
            UserError: the weights are of another student.
        """
        check_weights(checkpoint["state_dict"], self.state_dict(), str(self.trainer.ckpt_path))
        if next(iter(checkpoint["state_dict"].values())).dtype == torch.float64:
            self.student.double()  # Lightning converts after it has loaded
        self.bad_steps.total, self.bad_steps.in_a_row = checkpoint.get("bad_steps", (0, 0))
        if "teacher" in checkpoint:
            self.teacher.load_state_dict(checkpoint["teacher"])
        self.student.count_step()  # its weights have changed

    def _log_held_out(self, split: str) -> None:
        self.runner.finish()
        all_sum = Ranks(self.trainer, self.device).all_sum
        for name, value in self.runner.held_out.over_ranks(self.uneven, all_sum).items():
            self.log(f"{split}/{name}", value, prog_bar=True, sync_dist=self.trainer.world_size > 1)
