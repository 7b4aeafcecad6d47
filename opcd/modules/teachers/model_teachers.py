"""Teachers that are models: another one, the student's base, an average of it, or the student itself."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from opcd.accel.cpu.attention import use_cpu_attention
from opcd.accel.cpu.heap import let_go
from opcd.models import ModelConfig, load_model
from opcd.modules.distributed.sharding import InParts, whole
from opcd.modules.lm.adapters import trainable, twin, without_adapter
from opcd.modules.lm.hidden_states import States, check_head
from opcd.modules.student import Student
from opcd.modules.teachers.base import ModelTeacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError


class FrozenTeacher(ModelTeacher):
    """A model of any size that shares the student's tokenizer; its weights never change.

    Args:
        model: which model; null takes the student's own starting weights.
        shard: each rank keeps a part of its layers, and one is whole while it computes; false: all of it on every rank.
    """

    def __init__(self, model: ModelConfig | None = None, shard: bool = False) -> None:
        self.config, self.shard = model, shard
        self._model: PreTrainedModel | None = None
        self._parts: InParts | None = None

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Load the model. UserError where that fails."""
        key = f"{self.key}.init_args.model" if self.config else "model.student"
        self._model = load_model(self.config or student_config, key=key, device=device)
        use_cpu_attention(self._model)
        check_head(self._model, f"{key}.name")
        if self.shard:
            self._parts = InParts(self._model, device, f"{key}.name")
        self._model.to(device)  # type: ignore[arg-type]

    def score(self, trajectories: Trajectories, max_tokens: int) -> States:
        """As any model; where its layers lie in parts, the ranks make their passes together."""
        with self._parts.passes() if self._parts else nullcontext():
            return super().score(trajectories, max_tokens)

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `prepare`."""
        assert self._model is not None, "prepare() comes first"
        return self._model

    def release(self, least: int = 0) -> None:
        """The pages of weights that are mapped from a file: they are for the student's gradients meanwhile."""
        weights = list(self.model.parameters())
        if not self.shard and sum(weight.nbytes for weight in weights) >= least:
            let_go(weights)

    def after_step(self, student: Student) -> None:
        """Nothing to follow."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


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

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Start from the student's weights."""
        self._model = twin(student.model).to(device)  # type: ignore[arg-type]
        for average in trainable(self._model).values():
            # bfloat16 has 8 bits: an update of (1 - decay) times a small change would round away.
            average.data = average.data.float()

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `prepare`."""
        assert self._model is not None, "prepare() comes first"
        return self._model

    @torch.no_grad()
    def after_step(self, student: Student) -> None:
        """Move the average."""
        averages: list[Tensor] = list(trainable(self.model).values())
        if student.is_sharded:  # one whole tensor at a time
            for average, weight in zip(averages, trainable(student.model).values(), strict=True):
                average.lerp_(whole(weight).float(), 1 - self.decay)
        else:
            weights = [weight.float() for weight in trainable(student.model).values()]
            torch._foreach_lerp_(averages, weights, 1 - self.decay)
        self.prefix.clear()

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
        self.prefix.clear()


class BaseTeacher(ModelTeacher):
    """The student's own base under the context, without the adapter: the frozen weights serve both, in one memory."""

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Take the base of a student with an adapter."""
        self._model = without_adapter(student.model).to(device)  # type: ignore[arg-type]

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `prepare`."""
        assert self._model is not None, "prepare() comes first"
        return self._model

    def after_step(self, student: Student) -> None:
        """Nothing to follow: the base does not learn."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


class SelfTeacher(ModelTeacher):
    """The live student itself under the context: it learns to answer without the context as it does with it.

    Of a sharded student, each rank keeps a whole copy of this step's weights.
    """

    def __init__(self) -> None:
        self._student: Student | None = None

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Keep the student itself."""
        self._student = student

    @torch.inference_mode(mode=False)  # as in `StudentRollout.synchronise`
    def synchronise(self, student: Student) -> None:
        """Gather sharded weights: a pass of the student's own would wait for ranks that have fewer."""
        if student.is_sharded:
            self._student = None  # the former copy goes first
            self._student = student.plain(student.model.dtype)

    @property
    def model(self) -> PreTrainedModel:
        """The model that scores; there after `prepare`, of a sharded student after `synchronise`."""
        assert self._student is not None, "prepare() comes first"
        return self._student.model

    def after_step(self, student: Student) -> None:
        """Nothing to follow; what was computed with the old weights is dropped."""
        self.prefix.clear()

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""
