"""Inference engines that write responses with the student's weights, and how they are asked."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from opcd.modules.distributed.fsdp_strategy import SHARDED
from opcd.modules.lm.adapters import has_adapter, merged
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
"""Of `Sampling.options`: what vLLM has too, its name there, and what switches it off."""


@dataclass
class Completion:
    """One response of an engine.

    Attributes:
        tokens: token ids, the end-of-sequence token included.
        log_probs: of each token in nats, from the plain softmax: before temperature, top-k and top-p.
    """

    tokens: list[int]
    log_probs: list[float]


class Engine(ABC):
    """Writes responses faster than the trainer's own model would.

    Attributes:
        one_process: whether it works for one process alone, which has the student's weights whole.
    """

    one_process: ClassVar[bool] = False

    @property
    def window(self) -> int | None:
        """Most tokens of a prompt and its response; None where that is not known."""
        return None

    def check(self, run: "Run") -> None:
        """Refuse a run that this engine cannot serve (UserError)."""
        name = type(self).__name__
        if self.one_process and run.sharded:
            raise UserError(f"model.rollout: {name} takes no sharded weights ({SHARDED}); use VLLMServer, or ddp")
        if self.one_process and run.ranks > 1:
            raise UserError(f"model.rollout: {name} is for one process; use VLLMServer with several trainer.devices")
        if run.connect:
            self.connect()

    def connect(self) -> None:  # noqa: B027
        """See that the engine is there, before a model loads (UserError); `window` may be known only then."""

    @abstractmethod
    def sync_weights(self, student: Student, dtype: torch.dtype) -> None:
        """Take over the student's weights in `dtype`, an adapter merged; starts the engine the first time."""

    @abstractmethod
    def generate(self, prompts: list[list[int]], settings: dict[str, Any], seeds: list[int]) -> list[Completion]:
        """A response to each prompt of token ids, drawn as `vllm_settings` says, each from a seed of its own."""

    def sleep(self) -> None:  # noqa: B027
        """Give back what only `generate` needs; `sync_weights` or `generate` takes it again."""


def named_weights(student: Student, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Copies of all weights in `dtype`, an adapter merged.

    A head that is the embedding too comes under both names: vLLM keeps a copy of its own for it.
    """
    model = merged(student.model, dtype) if has_adapter(student.model) else student.model
    for name, weight in model.state_dict().items():
        yield name, weight.to(dtype, copy=True)


def check_options(sampling: Sampling) -> None:
    """Refuse what vLLM cannot do (`ValueError`)."""
    for name in sampling.options:
        if name not in OPTIONS:
            raise ValueError(f"sampling.options: vLLM has no {name}; it has {', '.join(OPTIONS)}")


def vllm_settings(sampling: Sampling, eos_ids: set[int]) -> dict[str, Any]:
    """The same in vLLM's words. Everything is said, so that no default of a model or a server comes in."""
    options = {theirs: sampling.options.get(ours, off) for ours, (theirs, off) in OPTIONS.items()}
    return options | {
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "stop_token_ids": sorted(eos_ids),
        "logprobs": 0,  # of the drawn token, and no others
    }
