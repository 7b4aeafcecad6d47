"""A teacher behind a server: it is asked for log-probabilities, and no weight of it is in this process."""

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
        """Refuse what a few log-probabilities a position do not serve, or a server that has not what is asked for."""
        distiller = run.distiller
        if any(part.asks_teacher for part in distiller.rollout.parts):
            raise UserError(
                "model.rollout: ServedTeacher scores responses and writes none; use StudentRollout, or "
                "RecordedRollout, which takes those of the data"
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
        """Note how many tokens a position a loss needs; 0: the sampled one alone.

        Raises:
            UserError: the loss needs more than a server tells.
        """
        self._k = 0 if loss.needs == "token" else getattr(loss, "k", 0)
        try:
            loss.check_record(self._k)
        except ValueError as error:
            raise UserError(f"model.loss: {error}") from error

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Ask the server whether it has the model, the tokenizer and as many tokens a position; needs no weights.

        Raises:
            UserError: it does not answer, or has not.
        """
        try:
            self._model.connect(tokenizer, self._k)
        except ServerError as error:
            raise UserError(f"{self.key}.init_args: {error}") from error

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Learn how many tokens the student has."""
        self._vocabulary = int(student.model.config.get_text_config().vocab_size)

    @contextmanager
    def session(self, trajectories: Trajectories) -> Iterator[None]:
        """Ask for all rows' log-probabilities, several requests at a time; equal rows once.

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
        try:
            yield
        finally:
            self._said = {}

    def score(self, trajectories: Trajectories, max_tokens: int) -> RecordedTopK | RecordedTokens:
        """What the server has said of all response tokens, [N, k] or [N]; within a `session`."""
        tokens, log_probs = zip(*(self._said[row] for row in _rows(trajectories)), strict=True)
        device = trajectories.responses[0].device
        ids, values = torch.cat(tokens).to(device), torch.cat(log_probs).to(device)
        if not self._k:
            return RecordedTokens(ids, values)
        # A longer vocabulary is padding, which the student has no token for: its mass is that of all the others.
        padding = ids >= self._vocabulary
        return RecordedTopK(ids.masked_fill(padding, self._vocabulary), values.masked_fill(padding, NEVER))


def _rows(trajectories: Trajectories) -> list[Row]:
    views = zip(trajectories.teacher_prompts, trajectories.responses, strict=True)
    return [(tuple(prompt.tolist()), tuple(response.tolist())) for prompt, response in views]
