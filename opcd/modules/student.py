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
from opcd.data import Views
from opcd.models import ModelConfig, load_model, load_tokenizer
from opcd.models.key_value_prefix import NAME, prefix_of
from opcd.modules.distributed.sharding import blank_copy, fill, shard
from opcd.modules.lm.adapters import (
    Lora,
    add_lora,
    has_adapter,
    keep_differentiable,
    merged,
    save_adapter,
    without_adapter,
)
from opcd.modules.lm.cartridge import Cartridge, add_cartridge
from opcd.modules.lm.generation import EncodedPrefix, Sampling, Told, generate
from opcd.modules.lm.hidden_states import HiddenStates, check_head, head_of
from opcd.modules.prefix.prefix_cache import Mode, PrefixCache
from opcd.modules.prefix.student_prefix import StudentPrefix
from opcd.modules.trajectories import Trajectories


class Student(nn.Module):
    """A causal language model that is trained to answer without the context.

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
        self._structure: tuple[PreTrainedModel, ...] = ()  # a tuple hides it from nn.Module
        if has_adapter(model):  # a checkpoint leaves out frozen weights, which can be loaded again
            self.register_state_dict_post_hook(_only_trainable)  # type: ignore[no-untyped-call]
            self.register_load_state_dict_post_hook(_frozen_may_be_missing)  # type: ignore[no-untyped-call]

    @classmethod
    def load(
        cls,
        config: ModelConfig,
        gradient_checkpointing: bool = False,
        adapter: Lora | Cartridge | None = None,
        device: torch.device | str = "cpu",
        context: Tensor | None = None,
    ) -> "Student":
        """Load the model of `config` on the CPU.

        Weights of type `auto` are float32. With an adapter they are frozen, and have the fastest type of `device`,
        where the student will run. `context` are the token ids that a Cartridge begins as (`context_start`); None: a
        checkpoint brings its values. UserError if the model cannot be loaded.
        """
        model = load_model(config, None if adapter else torch.float32, "model.student", device)
        keep_differentiable(model)
        accelerator(device).prepare(model)
        check_head(model, "model.student.name")
        if isinstance(adapter, Cartridge):
            add_cartridge(model, adapter, context)
        elif adapter is not None:
            add_lora(model, adapter)
        if gradient_checkpointing:
            # transformers 5.20 renamed the method; vLLM needs an older release.
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
            accelerator(device).prepare_recomputation(model)
        # Lightning expects training mode; dropout and gradient checkpointing need it.
        return cls(model.train(), load_tokenizer(config, "model.student"))

    @property
    def eos_ids(self) -> set[int]:
        """Token ids that end a response: those of the generation config and the tokenizer's."""
        return end_ids(self.model, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """Token id that fills short rows."""
        return int(self.tokenizer.pad_token_id)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows, padding included."""
        return int(self.model.config.get_text_config().vocab_size)

    def share_beginnings(self, mode: Mode) -> None:
        """Set whether `score` computes the common prefix of a pass's rows once; see `StudentPrefix`."""
        self._rows = StudentPrefix(mode)

    def shard(self, mesh: DeviceMesh, low: torch.dtype | None) -> None:
        """Keep only this rank's part of the weights; see `distributed.sharding.shard`. Then only `score` runs them."""
        self.share_beginnings("never")  # the comparison would be one more pass on some ranks
        self._structure = (blank_copy(self.model, device=torch.device("meta")),)
        shard(self, self.model, mesh, low)

    @property
    def version(self) -> tuple[int, int]:
        """Equal for equal weights: the optimizer steps, and the in-place writes that torch counts."""
        return self._steps, sum(weight._version for weight in self.model.parameters())

    def count_step(self) -> None:
        """Note a change of the weights that torch may not count."""
        self._steps += 1

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the weights."""
        return bool(self._structure)

    def reshard(self) -> None:
        """Free the weights that a forward pass without a backward pass has left gathered."""
        if self.is_sharded:
            FSDPModule.reshard(self)  # type: ignore[arg-type]

    def blank_copy(self, dtype: torch.dtype, device: torch.device | None = None) -> PreTrainedModel:
        """An unsharded copy of the model with uninitialized weights, by default on its device."""
        device = device or self.model.device
        source = self._structure[0] if self.is_sharded else self.model  # FSDP's modules cannot be copied
        copied = blank_copy(source, dtype, device)
        copied.to(device)  # type: ignore[arg-type]  # its buffers
        return copied

    def plain(self, dtype: torch.dtype, device: torch.device | None = None) -> "Student":
        """A student with unsharded weights of type `dtype`: this one if it has them, else a copy.

        If the weights are sharded, every rank must call this. On the device `meta` a rank keeps no weights.
        """
        if not self.is_sharded and self.model.dtype == dtype:
            return self
        copied = self.blank_copy(dtype, device)
        fill(copied, self.model)
        return Student(copied, self.tokenizer)

    def without_cartridge(self) -> "Student":
        """The student that a Cartridge is put before; this one if it has none."""
        if prefix_of(self.model) is None:
            return self
        return Student(without_adapter(self.model), self.tokenizer)

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
        """Generated text, without special tokens, for each prompt of token ids; arguments as for `generate`."""
        responses = generate(self.model, prompts, sampling, self.eos_ids, self.pad_id, prefixes, told)
        return [str(self.tokenizer.decode(response, skip_special_tokens=True)).strip() for response in responses]

    def save(self, folder: Path, dtype: torch.dtype | None = None, merge: bool = False) -> None:
        """Write a folder that `transformers` loads: weights (in `dtype`, or in their own type), tokenizer, template.

        Of a student with an adapter, only the adapter is written, in its own type, for peft. With `merge`, a model is
        written whose weights contain the adapter.
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
        self.model.config.dtype = dtype  # `save_pretrained` has written the model's type, not that of `weights`
        try:
            self.model.config.save_pretrained(folder)
        finally:
            self.model.config.dtype = own
        self.tokenizer.save_pretrained(folder)
        return None


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Token ids that end a response: those of the model's generation config and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return {int(i) for i in [*ids, tokenizer.eos_token_id] if i is not None}


@contextmanager
def _without_kept_casts(model: PreTrainedModel) -> Iterator[None]:
    """With gradient checkpointing, do not cache autocast's copies of the weights either."""
    device = model.device.type
    recomputes = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    if not (recomputes and torch.is_autocast_enabled(device)):
        yield
        return
    with torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False):
        yield


def _learnt(student: nn.Module) -> list[str]:
    """The names of an adapter's weights: the trainable ones, and a Cartridge's first token."""
    return [name for name, weight in student.named_parameters() if weight.requires_grad or f".{NAME}." in name]


def _only_trainable(student: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    kept = {prefix + name for name in _learnt(student)}
    for name in [name for name in state if name.startswith(prefix) and name not in kept]:
        del state[name]


def _frozen_may_be_missing(student: nn.Module, found: Any) -> None:
    learnt = tuple(_learnt(student))
    found.missing_keys[:] = [name for name in found.missing_keys if name.endswith(learnt)]


def respond(
    student: Student,
    views: Views,
    prompts: list[list[int]],
    context: str | None,
    sampling: Sampling,
    prefix: PrefixCache,
    told: Told | None = None,
) -> list[Tensor]:
    """Generate one response [R] of token ids per prompt, outside training.

    Args:
        student: model and tokenizer.
        views: what encoded the prompts.
        prompts: their token ids, the context's included.
        context: the context in all prompts, or None.
        sampling: how tokens are drawn, from torch's default generator.
        prefix: the cache of the context's keys and values.
        told: called for each new token.
    """
    rows = [torch.tensor(prompt) for prompt in prompts]
    prefixes = None
    if context is not None:
        shared = torch.tensor(views.teacher_prefix(context))
        # The first row twice: then a single row uses the cache as it would beside others.
        found = prefix.encoded(student.model, [shared] * (len(rows) + 1), [*rows, rows[0]])
        prefixes = found[:-1] if found else None
    return generate(student.model, rows, sampling, student.eos_ids, student.pad_id, prefixes, told)
