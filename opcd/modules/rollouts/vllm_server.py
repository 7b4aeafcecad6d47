"""vLLM as a server beside the trainer, which reads the student's weights from a shared folder."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import save_file

from opcd.modules.rollouts.engine import Completion, Engine, named_weights
from opcd.modules.student import Student
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.runtime.files.disk import (
    DiskError,
    claim_folder,
    explained,
    put_in_place,
    removed_on_failure,
    require_own,
    scratch_beside,
)
from opcd.serving import START, Card, Server, ServerError, find
from opcd.serving.response_shapes import Shape, completion

COMPLETIONS, RPC, PREFIXES = "/v1/completions", "/collective_rpc", "/reset_prefix_cache"
WEIGHTS, KEY = "model.safetensors", "weights of VLLMServer"


class VLLMServer(Engine):
    """A vLLM server, started with VLLM_SERVER_DEV_MODE=1 on the student's model (docs/rollouts.md).

    To update the weights, the first rank writes them to the folder `weights` and lets the server read them. Every rank
    requests the responses to its own rows.

    Args:
        base_url: URL of the server without /v1: http://localhost:8000.
        name: name of the model on the server (--served-model-name).
        weights: a folder that trainer and server share under this path, best in memory (/dev/shm/opcd): a new or empty
            one, or one of an earlier run. Other folders are an error.
        api_key_env: environment variable with the server's key; if it is not set, no key is sent.
        concurrency: concurrent requests of each rank.
        timeout: seconds that one request may take.
        patience: seconds for which a failed request is repeated, before the run ends with a checkpoint.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        weights: str,
        api_key_env: str = "OPCD_ROLLOUT_KEY",
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 1200.0,
    ) -> None:
        self._server = Server(base_url, api_key_env, concurrency, timeout, patience)
        self.name, self.weights = name, Path(weights).expanduser().absolute()
        self._card: Card | None = None
        self._vocabulary: int | None = None

    @property
    def window(self) -> int | None:
        """The window of the server's model; known after `connect`."""
        return None if self._card is None else self._card.window

    def connect(self) -> None:
        """Check for ten seconds that the server has the model and can reload weights (UserError)."""
        require_own(self.weights, KEY)
        try:
            self._card = find(self._server, self.name, START)
            self._forget(START)
        except ServerError as error:
            raise UserError(f"model.rollout's engine: {error}") from error

    def sync_weights(self, student: Student, dtype: torch.dtype) -> None:
        """Write the weights to the folder, on the first rank; all ranks wait for it (`leaving_together`).

        Sharded weights are first gathered on its CPU.

        Raises:
            StepAbandoned: the weights cannot be written, or the server does not load them.
        """
        self._vocabulary = int(student.model.config.get_text_config().vocab_size)
        if student.is_sharded:
            student = student.plain(dtype, torch.device("meta" if getattr(rank_zero_only, "rank", 0) else "cpu"))
        try:
            self._hand_over(student, dtype)
        except (ServerError, DiskError) as error:
            raise _abandoned(str(error)) from error

    @rank_zero_only
    def _hand_over(self, student: Student, dtype: torch.dtype) -> None:
        claim_folder(self.weights, [WEIGHTS], KEY)
        file = self.weights / WEIGHTS
        scratch = scratch_beside(file)
        weights = dict(named_weights(student, dtype))
        with explained(file, sum(weight.nbytes for weight in weights.values())), removed_on_failure(scratch):
            save_file(weights, scratch, {"format": "pt"})
            put_in_place(scratch, file)
        self._develop(RPC, {"method": "reload_weights", "kwargs": {"weights_path": str(self.weights)}})
        self._forget()

    def _develop(self, path: str, body: dict[str, Any], patience: float | None = None) -> Any:
        """The answer of a route that exists in the server's development mode only."""
        try:
            return self._server.post(path, [body], lambda answer, _: answer, patience=patience)[0]
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(f"{error}; start the server with VLLM_SERVER_DEV_MODE=1", 404) from error

    def _forget(self, patience: float | None = None) -> None:
        """Let the server drop its cached keys and values."""
        answer = self._develop(PREFIXES, {}, patience)
        if not isinstance(answer, dict) or not answer.get("success"):
            raise ServerError(f"{self._server.base_url} does not drop the keys and values of the previous weights")

    def generate(self, prompts: list[list[int]], settings: dict[str, Any], seeds: list[int]) -> list[Completion]:
        """Send one request per prompt; the server makes the batches.

        Raises:
            StepAbandoned: the server does not answer in time, or its answer is invalid.
        """
        shape = completion(settings.get("max_tokens"), self._vocabulary)
        common = {"model": self.name, "return_token_ids": True} | settings
        bodies = [common | {"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)]
        try:
            return self._server.post(COMPLETIONS, bodies, lambda answer, _: self._read(shape, answer))
        except ServerError as error:
            raise _abandoned(str(error)) from error

    def _read(self, shape: Shape, answer: Any) -> Completion:
        try:
            shape(answer, "answer")
        except ServerError as error:
            raise ServerError(f"{self._server.base_url}{COMPLETIONS}: {error}") from error
        (choice,) = answer["choices"]
        tokens, log_probs = choice["token_ids"], [float(value) for value in choice["logprobs"]["token_logprobs"]]
        if len(tokens) != len(log_probs) or not tokens:
            raise ServerError(f"{self._server.base_url}: {len(log_probs)} log-probabilities for {len(tokens)} tokens")
        return Completion(tokens, log_probs)


def _abandoned(problem: str) -> StepAbandoned:
    return StepAbandoned(
        f"the rollout: {problem}. The weights are as before the step: check the server, and resume with "
        "--ckpt_path last"
    )
