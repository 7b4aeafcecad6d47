"""Everything that the memory of a run depends on."""

from dataclasses import dataclass, field

import torch

from opcd.modules import Lora
from opcd.modules.lm.adapters import ALL_LINEAR
from opcd.planning.model_shapes import Shape, Weights

UNPACKED = 20.0
"""Bytes a number that bitsandbytes' 8-bit AdamW takes on a CPU for the weight that it is at (docs/log.md)."""


@dataclass(frozen=True)
class Setting:
    """A run of `opcd fit` as far as memory goes; bytes, tokens, and rows of one rank."""

    student: Weights
    scorer: Weights | None
    """The model that scores; None where a record does."""
    teacher_bytes: int = 0
    """Weights that the teacher has for itself."""
    teacher_leaves: bool = False
    """On a CPU, a frozen teacher's pages are mapped from its file, and leave when they have been read."""
    lora: Lora | None = None
    state_bytes: float = 8.0
    """What the optimizer keeps of each number that learns."""
    unpacked: float = 0.0
    """Bytes that its step takes beside them for each number of the weight that it is at."""
    fused: bool = True
    """Whether the optimizer's step needs no tensors beside its states."""
    writers: tuple[str, ...] = ("student",)
    """Who writes responses: student, teacher."""
    fast: torch.dtype = torch.bfloat16
    """What `dtype: auto` gives frozen weights, and those that write."""
    rollout_dtype: torch.dtype = torch.bfloat16
    """Of the weights of a student that writes."""
    batch: int = 8
    """Rows of a step."""
    query: int = 64
    """Tokens of the longest prompt without the context."""
    context: int = 1024
    """Tokens that the longest context adds to it."""
    contexts: int = 1
    """How many there are."""
    response: int = 128
    """Most tokens of a response."""
    answers: int = 6
    """Sample answers before training: rows of AnswerSamples; 0: there are none."""
    answer: int = 128
    """Most tokens of one."""
    micro_batch_tokens: int = 4096
    multi_turn: bool = False
    """A row makes more than one response (games)."""
    checkpointing: bool = False
    shared_prefix: bool = True
    prefix_bytes: int = 2048 * 2**20
    """Most that is kept of contexts, beyond one of them."""
    masks: bool = False
    """Whether packed rows attend with a mask of all pairs (SDPA or eager on a GPU)."""
    autocast: torch.dtype | None = torch.bfloat16
    gpu: bool = False
    packs: bool = False
    """On this CPU, linear layers are packed while a model generates."""
    keeps_freed: bool = False
    """Whether the heap keeps what is freed (glibc, on a CPU)."""
    ranks: int = 1
    sharded: bool = False
    """Weights, gradients and states lie in parts, one on each rank (FSDP2)."""
    process: int = field(default=0, compare=False)
    """Bytes of the process before a model is there; on a GPU nothing is known of it."""

    @property
    def parts_of(self) -> int:
        """Over how many ranks the student lies."""
        return self.ranks if self.sharded else 1

    @property
    def row(self) -> int:
        """Tokens of the longest row of a student."""
        return self.query + self.response

    @property
    def micro_rows(self) -> int:
        """Rows of a micro-batch of longest rows; a row that is too long is one of its own."""
        return min(self.batch, max(1, self.micro_batch_tokens // self.row))

    @property
    def tokens(self) -> int:
        """Of such a micro-batch."""
        return self.micro_rows * self.row

    @property
    def several_passes(self) -> bool:
        """Whether gradients of one micro-batch are there when the next comes."""
        return self.multi_turn or self.micro_rows < self.batch

    @property
    def adapter_weights(self) -> int:
        """Numbers of the adapter."""
        return adapter_weights(self.student.shape, self.lora) if self.lora else 0

    @property
    def gradient_bytes(self) -> int:
        """Gradients of all numbers that learn, on this rank."""
        own = self.student.bytes if self.lora is None else 4 * self.adapter_weights
        return own // self.parts_of

    @property
    def student_bytes(self) -> int:
        """The student's weights, its adapter's among them, on this rank."""
        return (self.student.bytes + 4 * self.adapter_weights) // self.parts_of

    @property
    def optimizer_bytes(self) -> int:
        """What the optimizer keeps, on this rank."""
        learnt = self.adapter_weights if self.lora else self.student.shape.weights
        return round(learnt * self.state_bytes) // self.parts_of

    @property
    def computing(self) -> int:
        """Bytes of a number in the student's products."""
        return self.student.computing(self.autocast)


def adapter_weights(shape: Shape, lora: Lora) -> int:
    """Numbers of an adapter: rank x (inputs + outputs) of each of its targets."""
    sizes = [a + b for name, a, b in shape.linears if lora.targets == ALL_LINEAR or name in lora.targets]
    head = shape.hidden + shape.vocabulary if lora.head else 0
    return lora.rank * (sum(sizes) + head)
