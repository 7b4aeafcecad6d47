"""Teachers that are models: another one, the student's base, an average of it, or the student itself."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.accel import accelerator
from opcd.models import ModelConfig, load_model
from opcd.modules.distributed.sharding import InParts, full_tensor
from opcd.modules.lm.adapters import trainable, twin, without_adapter
from opcd.modules.lm.hidden_states import HiddenStates, check_head
from opcd.modules.student import Student
from opcd.modules.teachers.base import ModelTeacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run


class FrozenTeacher(ModelTeacher):
    """A model of any size that shares the student's tokenizer; its weights never change.

    Args:
        model: which model; null takes the student's own starting weights.
        shard: each rank keeps a part of its layers, and one is whole while it computes; false: all of it on every rank.
    """

    frozen: ClassVar[bool] = True
    stands_alone: ClassVar[bool] = True

    def __init__(self, model: ModelConfig | None = None, shard: bool = False) -> None:
        self.config, self.shard = model, shard
        self._model: PreTrainedModel | None = None
        self._parts: InParts | None = None

    def setup(self, student: Student | None, student_config: ModelConfig, device: torch.device) -> None:
        """Load the model. UserError where that fails."""
        key = f"{self.key}.init_args.model" if self.config else "model.student"
        self._model = load_model(self.config or student_config, key=key, device=device)
        accelerator(device).prepare(self._model)
        check_head(self._model, f"{key}.name")
        if self.shard:
            self._parts = InParts(self._model, device, f"{key}.name")
        self._model.to(device)  # type: ignore[arg-type]

    def check(self, run: "Run") -> None:
        """Refuse what a teacher whose layers lie in parts cannot do."""
        if not self.shard:
            return
        key, distiller = f"{self.key}.init_args.shard", run.distiller
        if run.ranks == 1:
            raise UserError(f"{key} has no effect on one rank; remove it, or set trainer.devices")
        if len(distiller.teacher.parts) > 1:
            raise UserError(f"{key}: a rank without rows of this teacher would keep the others waiting; remove it")
        if any(writer.asks_teacher for writer in distiller.rollout.parts):
            raise UserError(f"{key}: a teacher in parts scores and does not write; use StudentRollout, or remove it")
        if self.config is not None and self.config.quantization != "none":
            raise UserError(f"{key}: quantized weights cannot lie in parts; remove it, or the quantization")
        if self.prefix.mode == "auto":
            raise UserError(
                f"{key}: model.shared_prefix: auto may fail on one rank alone, and the others would wait; set it to "
                "always (after a run on one rank that does not warn) or never"
            )

    def score(self, trajectories: Trajectories, max_tokens: int) -> HiddenStates:
        """As any model; where its layers lie in parts, the ranks make their passes together."""
        with self._parts.passes() if self._parts else nullcontext():
            return super().score(trajectories, max_tokens)

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `setup`."""
        assert self._model is not None, "setup() comes first"
        return self._model

    @property
    def idle_weights(self) -> list[Tensor]:
        """All of them, but of layers that lie in parts."""
        return [] if self.shard else list(self.model.parameters())


class MovingAverageTeacher(ModelTeacher):
    """An exponential moving average of the student's weights, in float32: w_T <- decay * w_T + (1 - decay) * w_S.

    Of the adapter's alone where the student has one; the frozen weights are then the student's own. Of a sharded
    student, each rank keeps a whole average.

    Args:
        decay: share of the old average that stays at every optimizer step, 0 < decay < 1.
    """

    def __init__(self, decay: float = 0.99) -> None:
        if not 0 < decay < 1:
            raise ValueError(
                f"decay must lie strictly between 0 and 1, got {decay}: 1 is FrozenTeacher, 0 is SelfTeacher"
            )
        self.decay = decay
        self._model: PreTrainedModel | None = None

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Start from the student's weights."""
        self._model = twin(student.model).to(device)  # type: ignore[arg-type]
        for average in trainable(self._model).values():
            # bfloat16 has 8 bits: an update of (1 - decay) times a small change would round away.
            average.data = average.data.float()

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `setup`."""
        assert self._model is not None, "setup() comes first"
        return self._model

    @torch.no_grad()
    def on_student_step(self, student: Student) -> None:
        """Move the average."""
        averages: list[Tensor] = list(trainable(self.model).values())
        if student.is_sharded:  # one whole tensor at a time
            for average, weight in zip(averages, trainable(student.model).values(), strict=True):
                average.lerp_(full_tensor(weight).float(), 1 - self.decay)
        else:
            weights = [weight.float() for weight in trainable(student.model).values()]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)

    def state_dict(self) -> dict[str, Any]:
        """The average."""
        return {"model": {name: average.detach() for name, average in trainable(self.model).items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        averages = trainable(self.model)
        if averages.keys() != state["model"].keys():
            raise UserError("ckpt_path: its moving average is of other weights than model.adapter gives here")
        for name, average in averages.items():
            average.data.copy_(state["model"][name])


class BaseTeacher(ModelTeacher):
    """The student's own base under the context, without the adapter: the frozen weights serve both, in one memory."""

    frozen: ClassVar[bool] = True

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def check(self, run: "Run") -> None:
        """Refuse a student without an adapter."""
        if run.distiller.adapter is None:
            raise UserError("model.teacher: BaseTeacher is the student without its adapter; set model.adapter")

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Take the base of a student with an adapter."""
        self._model = without_adapter(student.model).to(device)  # type: ignore[arg-type]

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `setup`."""
        assert self._model is not None, "setup() comes first"
        return self._model


class SelfTeacher(ModelTeacher):
    """The live student itself under the context: it learns to answer without the context as it does with it.

    Of a sharded student, each rank keeps a whole copy of this step's weights.
    """

    def __init__(self) -> None:
        self._student: Student | None = None

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Keep the student itself."""
        self._student = student

    @torch.inference_mode(mode=False)  # as in `StudentRollout.active`
    def sync_weights(self, student: Student) -> None:
        """Gather sharded weights: a pass of the student's own would wait for ranks that have fewer."""
        if student.is_sharded:
            self._student = None  # the former copy goes first
            self._student = student.plain(student.model.dtype)

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `setup`, of a sharded student after `sync_weights`."""
        assert self._student is not None, "setup() comes first"
        return self._student.model
