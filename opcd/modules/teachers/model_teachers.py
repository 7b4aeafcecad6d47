"""Teachers that are models: a frozen one, the student's average, the student's base, or the student itself."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from opcd.accel import accelerator
from opcd.models import ModelConfig, load_model
from opcd.modules.distributed.sharding import ShardedTeacher, full_tensor
from opcd.modules.lm.adapters import trainable, twin, without_adapter
from opcd.modules.lm.hidden_states import HiddenStates, check_head
from opcd.modules.student import Student
from opcd.modules.teachers.base import ModelTeacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run


class FrozenTeacher(ModelTeacher):
    """A model of any size with the student's tokenizer; its weights never change.

    Args:
        model: which model; null takes the student's starting weights.
        shard: shard the layers across the ranks, and gather each while it computes; false: every rank has all layers.
    """

    frozen: ClassVar[bool] = True
    stands_alone: ClassVar[bool] = True

    def __init__(self, model: ModelConfig | None = None, shard: bool = False) -> None:
        self.config, self.shard = model, shard
        self._shards: ShardedTeacher | None = None

    def setup(self, student: Student | None, student_config: ModelConfig, device: torch.device) -> None:
        """Load the model (UserError)."""
        key = f"{self.key}.init_args.model" if self.config else "model.student"
        self._model = load_model(self.config or student_config, key=key, device=device)
        accelerator(device).prepare(self._model)
        check_head(self._model, f"{key}.name")
        if self.shard:
            self._shards = ShardedTeacher(self._model, device, f"{key}.name")
        self._model.to(device)  # type: ignore[arg-type]

    def check(self, run: "Run") -> None:
        """Raise a UserError for what a sharded teacher cannot do."""
        if not self.shard:
            return
        key, distiller = f"{self.key}.init_args.shard", run.distiller
        if run.ranks == 1:
            raise UserError(f"{key} has no effect on one rank; remove it, or set trainer.devices")
        if len(distiller.teacher.parts) > 1:
            raise UserError(f"{key}: ranks without rows of this teacher would block the others; remove it")
        if any(writer.asks_teacher for writer in distiller.rollout.parts):
            raise UserError(f"{key}: a sharded teacher cannot write responses; use StudentRollout, or remove it")
        if self.config is not None and self.config.quantization != "none":
            raise UserError(f"{key}: quantized weights cannot be sharded; remove it, or the quantization")
        if self.prefix.mode == "auto":
            raise UserError(
                f"{key}: model.shared_prefix: auto may fall back on one rank and block the others; set it to always "
                "(after a run on one rank without a warning) or never"
            )

    def score(self, trajectories: Trajectories, max_tokens: int) -> HiddenStates:
        """Score; the ranks run a sharded model together."""
        with self._shards.passes() if self._shards else nullcontext():
            return super().score(trajectories, max_tokens)

    @property
    def idle_weights(self) -> list[Tensor]:
        """All weights; none of a sharded model."""
        return [] if self.shard else list(self.model.parameters())


class MovingAverageTeacher(ModelTeacher):
    """An exponential moving average of the student's weights, in float32: w_T <- decay * w_T + (1 - decay) * w_S.

    With an adapter, only the adapter's weights are averaged; the frozen weights are shared with the student. With a
    sharded student, each rank keeps the full average.

    Args:
        decay: weight of the old average in each optimizer step, 0 < decay < 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"decay must lie strictly between 0 and 1, got {decay}: 1 is FrozenTeacher, 0 is SelfTeacher"
            )
        self.decay = decay

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        self._model = twin(student.model).to(device)  # type: ignore[arg-type]
        for average in trainable(self._model).values():
            # In bfloat16 (8 bits), an update of (1 - decay) times a small change would be lost in rounding.
            average.data = average.data.float()

    @torch.no_grad()
    def on_student_step(self, student: Student) -> None:
        averages: list[Tensor] = list(trainable(self.model).values())
        if student.is_sharded:  # one whole tensor at a time
            for average, weight in zip(averages, trainable(student.model).values(), strict=True):
                average.lerp_(full_tensor(weight).float(), 1 - self.decay)
        else:
            weights = [weight.float() for weight in trainable(student.model).values()]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"model": {name: average.detach() for name, average in trainable(self.model).items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averaged weights (UserError)."""
        averages = trainable(self.model)
        if averages.keys() != state["model"].keys():
            raise UserError("ckpt_path: its moving average has other weights than model.adapter gives")
        for name, average in averages.items():
            average.data.copy_(state["model"][name])


class BaseTeacher(ModelTeacher):
    """The student's base with the context, without the adapter; both share the memory of the frozen weights."""

    frozen: ClassVar[bool] = True

    def check(self, run: "Run") -> None:
        if run.distiller.adapter is None:
            raise UserError("model.teacher: BaseTeacher is the student without its adapter; set model.adapter")

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        self._model = without_adapter(student.model).to(device)  # type: ignore[arg-type]


class SelfTeacher(ModelTeacher):
    """The live student itself with the context: it learns to answer without the context as it answers with it.

    With a sharded student, each rank keeps an unsharded copy of this step's weights.
    """

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        self._model = student.model

    @torch.inference_mode(mode=False)  # as in `StudentRollout.active`
    def sync_weights(self, student: Student) -> None:
        """Gather sharded weights: passes of the sharded model would wait for ranks with fewer passes."""
        if student.is_sharded:
            self._model = None  # free the previous copy first
            self._model = student.plain(student.model.dtype).model
