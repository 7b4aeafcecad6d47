"""The student's responses from an inference engine that takes over its weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from opcd.accel.precision import fast_dtype
from opcd.data import Batch, ContextQueryDataModule
from opcd.modules.lm.generation import Sampling
from opcd.modules.rollouts.base import Rollout, Writer, rollout_dtype
from opcd.modules.rollouts.engine import Engine, check_options, vllm_settings
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories

if TYPE_CHECKING:
    from opcd.modules.validation import Run


class VLLMRollout(Rollout):
    """On-policy as `StudentRollout`, y ~ p_B(. | x), where vLLM's p_B is the student's p_S up to rounding and age.

    Logs the gap between both, the mean of |log p_S(y) - log p_B(y)| over the drawn tokens, as
    `train/rollout_logprob_gap`.

    Args:
        engine: ColocatedVLLM (in this process) or VLLMServer.
        sampling: how tokens are drawn.
        dtype: type of the engine's weights; auto: bfloat16 where the device has instructions for it, else float32.
        every_n_steps: the weights are taken over at every n-th step; with more than 1 the responses are stale.
        importance_clip: weigh every token by min(p_S(y) / p_B(y), importance_clip), truncated importance sampling,
            which corrects what stale or low-precision weights draw otherwise. null: all tokens count the same.
    """

    writer: ClassVar[Writer] = "student"
    sampling: Sampling

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling = Sampling(),  # noqa: B008
        dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
        every_n_steps: int = 1,
        importance_clip: float | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        check_options(sampling)
        _check_importance(importance_clip, sampling)
        self.engine, self.sampling, self.every_n_steps = engine, sampling, every_n_steps
        self.dtype = rollout_dtype(dtype)
        self.importance_clip, self.stale = importance_clip, every_n_steps > 1
        self._steps = 0

    @property
    def engines(self) -> list[Engine]:
        """Its own."""
        return [self.engine]

    def check(self, run: "Run") -> None:
        """Refuse an engine that does not serve these ranks, or is not there."""
        self.engine.check(run)

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """As many as are sampled at most."""
        return self.sampling.max_new_tokens

    @contextmanager
    def active(self, student: Student) -> Iterator[None]:
        """Hand over the weights, in training at every n-th step; the engine may sleep afterwards."""
        if not student.training or self._steps % self.every_n_steps == 0:
            with torch.no_grad():
                self.engine.sync_weights(student, self.dtype or fast_dtype(student.model.device))
        self._steps += student.training
        try:
            yield
        finally:
            self.engine.sleep()

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Ask the engine; the seeds come from torch's default generator."""
        seeds = torch.randint(2**31, (len(batch),)).tolist()
        prompts = [prompt.tolist() for prompt in batch.student_prompts]
        written = self.engine.generate(prompts, vllm_settings(self.sampling, student.eos_ids), seeds)
        responses = [torch.tensor(each.tokens) for each in written]
        log_probs = [torch.tensor(each.log_probs) for each in written]
        return Trajectories.of(batch, responses, student.eos_ids, log_probs)


def _check_importance(limit: float | None, sampling: Sampling) -> None:
    if limit is None:
        return
    if not limit > 0:
        raise ValueError(f"importance_clip must be greater than 0, got {limit}")
    if sampling.temperature != 1 or sampling.is_cut:
        raise ValueError(
            "importance_clip needs tokens drawn from the softmax itself, whose log-probabilities the engine gives: set "
            "sampling.temperature to 1 and leave out top_p, top_k and options, or leave out importance_clip"
        )
