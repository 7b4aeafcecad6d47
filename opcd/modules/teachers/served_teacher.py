"""A teacher behind a server: it is asked for log-probabilities, and no weight of it is in this process."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opcd.data import Batch
from opcd.losses import Divergence, RecordedTokens, RecordedTopK, SampledReverseKL, TopK
from opcd.losses.log_probs import NEVER
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.modules.student import Student
from opcd.modules.teachers.base import Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.serving import ServedModel, Server, ServerError

Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of the prompt with the context, and of the response."""


class ServedTeacher(Teacher):
    """A model of any size behind a vLLM server, with the student's tokenizer: its log-probabilities of each response.

    It scores what others write (StudentRollout, RecordedRollout). The loss is a TopK of the teacher's support, whose k
    tokens a position are asked for, or SampledReverseKL, which needs those of the response alone. How to start the
    server: docs/served_teacher.md.

    Args:
        base_url: of the server, without /v1: http://localhost:8000.
        name: of the model, as the server lists it (--served-model-name).
        api_key_env: environment variable that holds the server's key; where it is not set, no key is sent.
        concurrency: requests in flight at a time, of each rank.
        timeout: seconds that one request may take.
        patience: seconds for which a row without an answer is asked for again, before the run ends with a checkpoint.
    """

    def __init__(
        self,
        base_url: str,
        name: str,
        api_key_env: str = "OPCD_TEACHER_KEY",
        concurrency: int = 8,
        timeout: float = 120.0,
        patience: float = 600.0,
    ) -> None:
        self.name = name
        self._model = ServedModel(Server(base_url, api_key_env, concurrency, timeout, patience), name)
        self._k = 0
        self._said: dict[Row, tuple[Tensor, Tensor]] = {}

    @property
    def window(self) -> int | None:
        """Most tokens of a prompt and its response; None where the server does not say."""
        return self._model.window

    def check(self, loss: Divergence | SampledReverseKL, temperature: float) -> None:
        """Refuse what a few log-probabilities a position do not serve (UserError), and note how many there must be."""
        if temperature != 1:
            raise UserError(
                f"model.temperature is {temperature}, but a server gives log-probabilities at 1; set it to 1"
            )
        if isinstance(loss, SampledReverseKL):
            self._k = 0
            return
        if not isinstance(loss, TopK):
            raise UserError(
                "model.loss: a server tells log-probabilities of a few tokens a position; use TopK with support: "
                "teacher, or SampledReverseKL"
            )
        try:
            loss.check_record(loss.k)
        except ValueError as error:
            raise UserError(f"model.loss: {error}") from error
        self._k = loss.k

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask the server whether it has the model, the tokenizer and as many tokens a position; needs no weights.

        Raises:
            UserError: it does not answer, or has not.
        """
        try:
            self._model.connect(tokenizer, self._k)
        except ServerError as error:
            raise UserError(f"{self.key}.init_args: {error}") from error

    def prepare(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Learn how many tokens the student has."""
        self._vocabulary = int(student.model.config.get_text_config().vocab_size)

    def ask(self, trajectories: Trajectories) -> None:
        """Send all rows, several at a time; equal ones once.

        Raises:
            StepAbandoned: the server does not answer in time, or gives what cannot be right.
        """
        rows = list(dict.fromkeys(_rows(trajectories)))
        try:
            said = self._model.log_probs([(list(prompt), list(response)) for prompt, response in rows], self._k)
        except ServerError as error:
            raise StepAbandoned(
                f"{self.key}: {error}. The weights are as before the step: see to the server, and go on with "
                "--ckpt_path last"
            ) from error
        self._said = dict(zip(rows, said, strict=True))

    def score(self, trajectories: Trajectories, max_tokens: int) -> RecordedTopK | RecordedTokens:
        """What the server has said of all response tokens, [N, k] or [N]; `ask` comes first."""
        tokens, log_probs = zip(*(self._said[row] for row in _rows(trajectories)), strict=True)
        device = trajectories.responses[0].device
        ids, values = torch.cat(tokens).to(device), torch.cat(log_probs).to(device)
        if not self._k:
            return RecordedTokens(ids, values)
        # A longer vocabulary is padding, which the student has no token for: its mass is that of all the others.
        padding = ids >= self._vocabulary
        return RecordedTopK(ids.masked_fill(padding, self._vocabulary), values.masked_fill(padding, NEVER))

    def respond(self, batch: Batch, sampling: Sampling, eos_ids: set[int], pad_id: int) -> list[Tensor]:
        """It writes nothing; `check_served` refuses a rollout that would ask."""
        raise UserError("model.rollout: ServedTeacher scores responses and writes none; use StudentRollout")

    def after_step(self, student: Student) -> None:
        """Nothing to follow."""

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the weights are elsewhere."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to take back."""


def _rows(trajectories: Trajectories) -> list[Row]:
    views = zip(trajectories.teacher_prompts, trajectories.responses, strict=True)
    return [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in views]
