"""Out of memory: which setting to turn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from opcd.errors import StepAbandoned, UserError
from opcd.modules.meters import Stopwatch

KNOBS = {
    "sync": "model.rollout's dtype: bfloat16",
    "rollout": "data.batch_size, or max_new_tokens in model.rollout's sampling",
    "teacher": "model.micro_batch_tokens, data.max_context_tokens, or model.prefix_memory_mib",
    "student": "model.micro_batch_tokens, or set model.gradient_checkpointing: true",
    "loss": "model.micro_batch_tokens",
    "optimizer": "an optimizer with a smaller state, or a smaller student",
}
"""What takes less memory, by the part of a step that asked for too much."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on a CPU."""
    text = str(error)
    on_cpu = isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "can't allocate memory" in text)
    return on_cpu or isinstance(error, torch.OutOfMemoryError | MemoryError)


@contextmanager
def naming_the_knob(clock: Stopwatch, alone: bool) -> Iterator[None]:
    """Turn a failed allocation within a step into one message that names the settings to lower.

    Args:
        clock: knows in which part of the step it happened.
        alone: there are no other ranks, which would wait for this one: the state before the step can be saved.

    Raises:
        StepAbandoned: the weights are as before the step, and can be saved.
        UserError: there are other ranks, or the optimizer was at work.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        part = clock.part
        kind = StepAbandoned if alone and part != "optimizer" else UserError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise kind(
            f"out of memory in a step's {part} ({reason}); lower {KNOBS[part]}, and go on with --ckpt_path last"
        ) from error
