"""The model that is trained, with its tokenizer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.accel import accelerator
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.modules.distributed.sharding import blank_copy, fill, shard
from opcd.modules.lm.adapters import Lora, add_lora, has_adapter, keep_differentiable, merged, save_adapter, trainable
from opcd.modules.lm.decoding import Told
from opcd.modules.lm.generation import EncodedPrefix, Sampling, generate
from opcd.modules.lm.hidden_states import HiddenStates, check_head, head_of
from opcd.modules.prefix.prefix_cache import Mode
from opcd.modules.prefix.student_prefix import StudentPrefix
from opcd.modules.trajectories import Trajectories


class Student(nn.Module):
    """A causal language model that answers without the context and learns.

    Args:
        model: float32 master weights for mixed precision (the default of `Student.load`).
        tokenizer: the tokenizer of both views.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.share_beginnings("never")
        self._steps = 0
        self._structure: tuple[PreTrainedModel, ...] = ()  # within a tuple it is no part of this module
        if has_adapter(model):  # frozen weights are no part of a checkpoint: they can be loaded again
            self.register_state_dict_post_hook(_only_trainable)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_frozen_may_be_missing)  # type: ignore[no-untyped-call]

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        gradient_checkpointing: bool = False,
        adapter: Lora | None = None,
        device: torch.device | str = "cpu",
    ) -> "Student":
        """Load as `config` says, on the CPU.

        Weights of type `auto` are float32; under an adapter, which leaves them frozen, of the type that `device`, where
        the student will run, computes fastest in. UserError where the model cannot be loaded.
        """
        model = load_model(config, None if adapter else torch.float32, "model.student", device)
        keep_differentiable(model)
        accelerator(device).prepare(model)
        check_head(model, "model.student.name")
        if adapter is not None:
            add_lora(model, adapter)
        if gradient_checkpointing:
            # Its name of before transformers 5.20, which vLLM still wants, is deprecated.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            accelerator(device).prepare_recomputation(model)
        # Training mode is what Lightning expects to find, and what dropout and gradient checkpointing act in.
        return cls(model.train(), load_tokenizer(config, "model.student"))

    @property
    def eos_ids(self) -> set[int]:
        """Token ids that end a response: those of the generation config and the tokenizer's own."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        ids = configured if isinstance(configured, list) else [configured]
        return {int(i) for i in [*ids, self.tokenizer.eos_token_id] if i is not None}

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows, padding included."""
        return int(self.model.config.get_text_config().vocab_size)

    def share_beginnings(self, mode: Mode) -> None:
        """Whether `score` computes once what all rows of a pass begin with; see `StudentPrefix`."""
        self._rows = StudentPrefix(mode)

    def shard(self, mesh: DeviceMesh, low: torch.dtype | None) -> None:
        """Leave each rank its part of the weights; see `distributed.sharding.shard`. Only `score` runs them then."""
        self.share_beginnings("never")  # to compare would be a pass more on ranks whose rows share something
        self._structure = (blank_copy(self.model, device=torch.device("meta")),)
        shard(self, self.model, mesh, low)

    @property
    def version(self) -> tuple[int, int]:
        """Equal for equal weights: optimizer steps, and writes in place that torch knows of."""
        return self._steps, sum(weight._version for weight in self.model.parameters())

    def count_step(self) -> None:
        """Note that the weights have changed in a way that torch may not know of."""
        self._steps += 1

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the weights."""
        return bool(self._structure)

    def reshard(self) -> None:
        """Give back what a pass without a backward pass has left gathered."""
        if self.is_sharded:
            FSDPModule.reshard(self)  # type: ignore[arg-type]

    def blank_copy(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """A whole model like the student's, by default on its device, whose weights are not filled."""
        device = device or self.model.device
        source = self._structure[0] if self.is_sharded else self.model  # FSDP's modules cannot be copied
        copied = blank_copy(source, dtype, device)
        copied.to(device)  # type: ignore[arg-type]  # its buffers
        return copied

    def plain(self, dtype: torch.dtype, device: torch.device | None = None) -> "Student":
        """A student that generates by itself: this one where it is whole and of that type, else a copy.

        Where the weights are sharded, every rank must ask at the same time. One that is content with `meta` as the
        device keeps nothing.
        """
        if not self.is_sharded and self.model.dtype == dtype:
            return self
        copied = self.blank_copy(dtype, device)
        fill(copied, self.model)
        return Student(copied, self.tokenizer)

    def forward(self, trajectories: Trajectories) -> Tensor:
        """Last hidden states that predict the responses, [N, H]; sharded weights are gathered around this call."""
        return self._rows.last_hidden(self.model, trajectories.student_prompts, trajectories.responses)

    def score(self, trajectories: Trajectories) -> HiddenStates:
        """HiddenStates of p_S(. | x, y<t) for all response tokens, with gradient."""
        with _without_kept_casts(self.model):
            return HiddenStates(self(trajectories), head_of(self.model))

    def answer(
        self,
        prompts: list[Tensor],
        sampling: Sampling,
        prefixes: list[EncodedPrefix] | None = None,
        told: Told | None = None,
    ) -> list[str]:
        """Generated text, without special tokens, for each prompt of token ids; the rest as for `generate`."""
        responses = generate(self.model, prompts, sampling, self.eos_ids, self.pad_id, prefixes, told)
        return [str(self.tokenizer.decode(response, skip_special_tokens=True)).strip() for response in responses]

    def save(self, folder: Path, dtype: torch.dtype | None = None, merge: bool = False) -> None:
        """Write a folder that plain `transformers` loads: weights (in `dtype`, or as they are), tokenizer, template.

        A student with an adapter is written as the adapter, in its own type, for peft; or, with `merge`, as a model
        whose weights hold it.
        """
        if merge:
            return Student(merged(self.model, dtype or self.model.dtype), self.tokenizer).save(folder, dtype)
        if has_adapter(self.model):
            save_adapter(self.model, folder)
            self.tokenizer.save_pretrained(folder)
            return None
        own: torch.dtype = self.model.dtype
        dtype = dtype or own
        casts: dict[int, Tensor] = {}  # by address, so that tied weights stay one tensor
        for weight in self.model.state_dict().values():
            casts.setdefault(weight.data_ptr(), weight.to(dtype) if weight.is_floating_point() else weight)
        weights = {name: casts[weight.data_ptr()] for name, weight in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        self.model.config.dtype = dtype  # `save_pretrained` has written the type of the model, not of `weights`
        try:
            self.model.config.save_pretrained(folder)
        finally:
            self.model.config.dtype = own
        self.tokenizer.save_pretrained(folder)
        return None


@contextmanager
def _without_kept_casts(model: PreTrainedModel) -> Iterator[None]:
    """Where activations are computed twice to save memory, so are the low-precision casts of each layer's weights."""
    device = model.device.type
    if not (_recomputes(model) and torch.is_autocast_enabled(device)):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def _recomputes(model: PreTrainedModel) -> bool:
    """Whether gradient checkpointing is on."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _only_trainable(student: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    kept = {prefix + name for name in trainable(student)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _frozen_may_be_missing(student: nn.Module, found: Any) -> None:
    learnt = tuple(trainable(student))
    found.missing_keys[:] = [name for name in found.missing_keys if name.endswith(learnt)]
