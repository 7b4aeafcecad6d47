"""The interface of an inference engine that generates with the student's weights."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from opcd.modules.distributed.fsdp_strategy import SHARDED
from opcd.modules.lm.adapters import has_adapter, merged
from opcd.modules.lm.cartridge import Cartridge
from opcd.modules.lm.generation import Sampling
from opcd.modules.student import Student
from opcd.runtime.errors import UserError

if TYPE_CHECKING:
    from opcd.modules.validation import Run

OPTIONS = {
    "min_p": ("min_p", 0.0),
    "repetition_penalty": ("repetition_penalty", 1.0),
    "min_new_tokens": ("min_tokens", 0),
}
"""The `Sampling.options` that vLLM has too: vLLM's name, and the value that turns it off."""


@dataclass
class Completion:
    """A response of an engine.

    Attributes:
        tokens: token ids, the end-of-sequence token included.
        log_probs: of each token in nats, from the plain softmax: before temperature, top-k and top-p.
    """

    tokens: list[int]
    log_probs: list[float]


class Engine(ABC):
    """Generates responses faster than the trainer's own model.

    Attributes:
        one_process: whether it works in a single process with unsharded weights only.
    """

    one_process: ClassVar[bool] = False

    @property
    def window(self) -> int | None:
        """Most tokens of a prompt and its response; None if unknown."""
        return None

    def check(self, run: "Run") -> None:
        """Raise a UserError for a run that does not work with this engine."""
        name = type(self).__name__
        if isinstance(run.distiller.adapter, Cartridge):
            raise UserError(f"model.rollout: {name} takes weights, and no Cartridge; use StudentRollout, or Lora")
        if self.one_process and run.sharded:
            raise UserError(f"model.rollout: {name} takes no sharded weights ({SHARDED}); use VLLMServer, or ddp")
        if self.one_process and run.ranks > 1:
            raise UserError(f"model.rollout: {name} is for one process; use VLLMServer with several trainer.devices")
        if run.connect:
            self.connect()

    def connect(self) -> None:  # noqa: B027
        """Check that the engine is available, before a model is loaded (UserError); `window` may need it."""

    @abstractmethod
    def sync_weights(self, student: Student, dtype: torch.dtype) -> None:
        """Copy the student's weights in `dtype`, with a merged adapter; the first call starts the engine."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], settings: dict[str, Any], seeds: list[int]) -> list[Completion]:
        """Generate a response to each prompt of token ids, with the `vllm_settings` and one seed per prompt."""

    def sleep(self) -> None:  # noqa: B027
        """Free the memory that only `generate` needs, until `sync_weights` or `generate` is called."""


def named_weights(student: Student, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Copies of all weights in `dtype`, with a merged adapter.

    A head that is tied to the embedding appears under both names: vLLM keeps a copy for each.
    """
    model = merged(student.model, dtype) if has_adapter(student.model) else student.model
    for name, weight in model.state_dict().items():
        yield name, weight.to(dtype, copy=True)


def check_options(sampling: Sampling) -> None:
    """Raise a ValueError for an option that vLLM does not have."""
    for name in sampling.options:
        if name not in OPTIONS:
            raise ValueError(f"sampling.options: vLLM has no {name}; it has {', '.join(OPTIONS)}")


def vllm_settings(sampling: Sampling, eos_ids: set[int]) -> dict[str, Any]:
    """The same settings for vLLM. All are set, so that no default of a model or a server applies."""
    options = {theirs: sampling.options.get(ours, off) for ours, (theirs, off) in OPTIONS.items()}
    return options | {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": sorted(eos_ids),
        "logprobs": 0,  # of the drawn token, and no others
    }
