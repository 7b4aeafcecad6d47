"""Out of memory: which setting to turn, or the same again in smaller micro-batches."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch.utilities import rank_zero_warn

from opcd.modules.step.metrics import PhaseTimer
from opcd.runtime.errors import StepAbandoned, UserError

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
def explain_oom(timer: PhaseTimer, alone: bool) -> Iterator[None]:
    """Turn a failed allocation within a step into one message that names the settings to lower.

    Args:
        timer: knows in which phase of the step it happened.
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
        part = timer.phase
        kind = StepAbandoned if alone and part != "optimizer" else UserError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise kind(
            f"out of memory in a step's {part} ({reason}); lower {KNOBS[part]}, and go on with --ckpt_path last"
        ) from error


def shrinking(run: Callable[[int], None], undo: Callable[[], None], tokens: int, fewest: int) -> int:
    """Call `run(tokens)`, with half the tokens each time an allocation fails; the tokens that it took.

    Args:
        run: draws the same random numbers each time, as its first attempt did.
        undo: takes back what a failed attempt has left.
        tokens: of the first attempt.
        fewest: the error is passed on where so few did not fit.
    """
    cpu = torch.get_rng_state()
    gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    while True:
        try:
            run(tokens)
            return tokens
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or tokens <= fewest:
                raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        undo()  # only here: the error held the frames, and the frames the tensors
        torch.set_rng_state(cpu)
        if gpu:
            torch.cuda.set_rng_state_all(gpu)
            torch.cuda.empty_cache()
        tokens = max(fewest, tokens // 2)
        rank_zero_warn(f"out of memory ({reason}): model.micro_batch_tokens is {tokens} from here on")
