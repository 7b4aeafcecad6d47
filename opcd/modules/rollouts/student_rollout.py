"""Responses of the student: on-policy."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, Literal

import torch
from transformers import PreTrainedModel

from opcd.accel import accelerator
from opcd.accel.precision import fast_dtype, warn_if_emulated
from opcd.data import Batch, ContextQueryDataModule
from opcd.modules.distributed.sharding import fill
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.rollouts.base import Rollout, Writer, rollout_dtype
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError


class StudentRollout(Rollout):
    """On-policy: y ~ p_S(. | x), the student answers without the context.

    Args:
        sampling: how tokens are drawn.
        dtype: type of the generating weights; auto: bfloat16 if the device has instructions for it, else float32.
            If it differs from the student's type, or the student is sharded, a copy is filled from the master weights
            in each step; its memory is freed after the rollout.
        rows_at_a_time: most responses that are written side by side; the others follow, so that a large batch fits.
            auto: as many as fit into a GPU's free memory, on other devices all. The draws depend on it.
    """

    writer: ClassVar[Writer] = "student"
    sampling: Sampling

    def __init__(
        self,
        sampling: Sampling = Sampling(),  # noqa: B008
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        rows_at_a_time: int | Literal["auto"] = "auto",
    ) -> None:
        if rows_at_a_time != "auto" and rows_at_a_time < 1:
            raise ValueError(f"rows_at_a_time must be auto or at least 1, got {rows_at_a_time}")
        self.sampling = sampling
        self.rows_at_a_time = None if rows_at_a_time == "auto" else rows_at_a_time
        self.dtype = rollout_dtype(dtype)
        self._copy: PreTrainedModel | None = None

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        return self.sampling.max_new_tokens

    @contextmanager
    def active(self, student: Student) -> Iterator[None]:
        """Fill the copy, if one is needed; afterwards its memory is free for the gradients."""
        if not self._needs_copy(student):
            yield
            return
        dtype = self._dtype(student)
        copied = self._filled(student, dtype)
        try:
            with accelerator(copied.device).fast_linears(copied, dtype, self.sampling.max_new_tokens, consume=True):
                yield
        finally:
            for parameter in copied.parameters():
                parameter.untyped_storage().resize_(0)

    @torch.inference_mode(mode=False)  # tensors of a validation that came first could not be overwritten later
    @torch.no_grad()
    def _filled(self, student: Student, dtype: torch.dtype) -> PreTrainedModel:
        """The copy with the student's current weights."""
        master = student.model
        if getattr(master, "is_quantized", False):
            raise UserError(
                f"model.rollout: a quantized student computes in {str(master.dtype)[6:]}; remove the rollout's dtype"
            )
        if self._copy is None or self._copy.device != master.device:
            self._copy = student.blank_copy(dtype)
        for parameter in self._copy.parameters():
            parameter.untyped_storage().resize_(parameter.nbytes)
        fill(self._copy, master)
        return self._copy

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        model = self._copy if self._needs_copy(student) else student.model
        assert model is not None, "within `active` only"
        responses = generate(
            *(model, batch.student_prompts, self.sampling, student.eos_ids, student.pad_id),
            rows_at_a_time=self.rows_at_a_time,
        )
        return Trajectories.of(batch, responses, student.eos_ids)

    def _needs_copy(self, student: Student) -> bool:
        return student.is_sharded or student.model.dtype != self._dtype(student)

    def _dtype(self, student: Student) -> torch.dtype:
        """The configured type; auto: the fastest type of the device, or a quantized student's own type."""
        device = student.model.device
        if self.dtype is None:
            return student.model.dtype if getattr(student.model, "is_quantized", False) else fast_dtype(device)
        warn_if_emulated("model.rollout's dtype", self.dtype, device)
        return self.dtype
