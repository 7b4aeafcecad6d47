"""vLLM as a server beside the trainer: it reads the student's weights from a folder that both see."""

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
    """A server that was started with VLLM_SERVER_DEV_MODE=1 on the student's model (docs/vllm.md).

    At every renewal the first rank writes the weights to `weights`, and has the server read them; all ranks ask it for
    the responses to their own rows.

    Args:
        base_url: of the server, without /v1: http://localhost:8000.
        name: of the model, as the server lists it (--served-model-name).
        weights: a folder for the weights that trainer and server both see under this path, best in memory
            (/dev/shm/opcd): a new or an empty one, or one that a former run has made. Others are refused.
        api_key_env: environment variable that holds the server's key; where it is not set, no key is sent.
        concurrency: requests in flight at a time, of each rank.
        timeout: seconds that one request may take.
        patience: seconds that a response is asked for in all, before the run ends with a checkpoint.
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
        """As the server says once it is connected."""
        return None if self._card is None else self._card.window

    def connect(self) -> None:
        """Ask whether the server has the model, and takes weights (UserError); for ten seconds."""
        require_own(self.weights, KEY)
        try:
            self._card = find(self._server, self.name, START)
            self._forget(START)
        except ServerError as error:
            raise UserError(f"model.rollout's engine: {error}") from error

    def sync_weights(self, student: Student, dtype: torch.dtype) -> None:
        """Through the folder, on the first rank; the step waits for it on all (`leaving_together`).

        Sharded weights are gathered there first, on the CPU.

        Raises:
            StepAbandoned: they cannot be written, or the server does not take them.
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
        """What a route says that a server has in its development mode alone."""
        try:
            return self._server.post(path, [body], lambda answer, _: answer, patience=patience)[0]
        except ServerError as error:
            if error.status != 404:
                raise
            raise ServerError(f"{error}; start the server with VLLM_SERVER_DEV_MODE=1", 404) from error

    def _forget(self, patience: float | None = None) -> None:
        """Have the server drop the keys and values that it has kept."""
        answer = self._develop(PREFIXES, {}, patience)
        if not isinstance(answer, dict) or not answer.get("success"):
            raise ServerError(f"{self._server.base_url} keeps what it has computed with the former weights")

    def generate(self, prompts: list[list[int]], settings: dict[str, Any], seeds: list[int]) -> list[Completion]:
        """A request a prompt; the server makes batches of them.

        Raises:
            StepAbandoned: it does not answer in time, or not in vLLM's form.
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
            raise ServerError(f"{self._server.base_url}: {len(log_probs)} log-probabilities of {len(tokens)} tokens")
        return Completion(tokens, log_probs)


def _abandoned(problem: str) -> StepAbandoned:
    return StepAbandoned(
        f"the rollout: {problem}. The weights are as before the step: see to the server, and go on with "
        "--ckpt_path last"
    )
