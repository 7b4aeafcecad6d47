"""A teacher behind a server, which gives log-probabilities; no weights are loaded in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from opcd.losses import Loss, RecordedTokens, RecordedTopK
from opcd.losses.divergences import Known
from opcd.losses.log_probs import NEVER
from opcd.models import ModelConfig, load_tokenizer
from opcd.modules.student import Student
from opcd.modules.teachers.base import Reader, Teacher
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import StepAbandoned, UserError
from opcd.serving import ServedModel, Server, ServerError

if TYPE_CHECKING:
    from opcd.modules.validation import Run


Row = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of the prompt with the context, and of the response."""


class ServedTeacher(Teacher):
    """A model of any size behind a vLLM server, with the student's tokenizer: log-probabilities of each response.

    It scores responses of StudentRollout or RecordedRollout, and writes none. The loss is a TopK of the teacher's
    support, which needs k tokens per position, or SampledReverseKL, which needs the response's tokens only. How to
    start the server: docs/teachers.md.

    Args:
        base_url: URL of the server without /v1: http://localhost:8000.
        name: name of the model on the server (--served-model-name).
        api_key_env: environment variable with the server's key; if it is not set, no key is sent.
        concurrency: concurrent requests of each rank.
        timeout: seconds that one request may take.
        patience: seconds for which a failed request is repeated, before the run ends with a checkpoint.
    """

    provides: ClassVar[tuple[Known, ...]] = ("topk", "token")

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
    def reader(self) -> Reader:
        """The model behind the server."""
        return Reader(f"{self.key}.init_args.name", self.name, self._model.window)

    def check(self, run: "Run") -> None:
        """Check the run and the server (UserError): it gives log-probabilities of a few tokens only."""
        distiller = run.distiller
        if any(part.asks_teacher for part in distiller.rollout.parts):
            raise UserError(
                "model.rollout: ServedTeacher scores responses and writes none; use StudentRollout, or "
                "RecordedRollout, which takes the responses of the data"
            )
        if distiller.objective.temperature != 1:
            raise UserError(
                f"model.temperature is {distiller.objective.temperature}, but a server gives log-probabilities at 1; "
                "set it to 1"
            )
        self.serve(distiller.objective.loss)
        if run.connect:
            self.connect(load_tokenizer(distiller.student_config, "model.student"))

    def serve(self, loss: Loss) -> None:
        """Set the number of tokens per position that a loss needs; 0: the sampled token only.

        Raises:
            UserError: the loss needs more than a server gives.
        """
        self._k = 0 if loss.needs == "token" else getattr(loss, "k", 0)
        try:
            loss.check_record(self._k)
        except ValueError as error:
            raise UserError(f"model.loss: {error}") from error

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Check that the server has the model and the tokenizer, and gives enough tokens per position.

        Raises:
            UserError: it does not, or does not answer.
        """
        try:
            self._model.connect(tokenizer, self._k)
        except ServerError as error:
            raise UserError(f"{self.key}.init_args: {error}") from error

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Read the size of the student's vocabulary."""
        self._vocabulary = int(student.model.config.get_text_config().vocab_size)

    @contextmanager
    def session(self, trajectories: Trajectories) -> Iterator[None]:
        """Request the log-probabilities of all rows concurrently, equal rows once.

        Raises:
            StepAbandoned: the server does not answer in time, or its answer is invalid.
        """
        rows = list(dict.fromkeys(_rows(trajectories)))
        try:
            said = self._model.log_probs([(list(prompt), list(response)) for prompt, response in rows], self._k)
        except ServerError as error:
            raise StepAbandoned(
                f"{self.key}: {error}. The weights are as before the step: check the server, and resume with "
                "--ckpt_path last"
            ) from error
        self._said = dict(zip(rows, said, strict=True))
        try:
            yield
        finally:
            self._said = {}

    def score(self, trajectories: Trajectories, max_tokens: int) -> RecordedTopK | RecordedTokens:
        """The server's log-probabilities of all response tokens, [N, k] or [N]; within a `session`."""
        tokens, log_probs = zip(*(self._said[row] for row in _rows(trajectories)), strict=True)
        device = trajectories.responses[0].device
        ids, values = torch.cat(tokens).to(device), torch.cat(log_probs).to(device)
        if not self._k:
            return RecordedTokens(ids, values)
        # Ids beyond the student's vocabulary are padding; their mass counts as that of all other tokens.
        padding = ids >= self._vocabulary
        return RecordedTopK(ids.masked_fill(padding, self._vocabulary), values.masked_fill(padding, NEVER))


def _rows(trajectories: Trajectories) -> list[Row]:
    views = zip(trajectories.teacher_prompts, trajectories.responses, strict=True)
    return [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in views]
