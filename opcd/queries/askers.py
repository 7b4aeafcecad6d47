"""The model that writes questions and answers them: one on this machine, or one behind a server."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch

from opcd.data import Batch, Example, Views
from opcd.data.example import Message
from opcd.evaluation.batched_answers import prompt_ids
from opcd.models import ModelConfig, context_window, load_model, load_tokenizer
from opcd.modules import SelfTeacher, Student, Trajectories
from opcd.modules.fixed_responses import FixedResponses
from opcd.modules.lm.generation import Sampling, eval_mode, generate, own_precision
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.queries.filters import likeness
from opcd.runtime.errors import UserError
from opcd.serving.client import Server, ServerError
from opcd.writing.written import Written

CHAT = "/v1/chat/completions"
SECOND = 0.5
"""The temperature of the second answer."""
MAX_TOKENS = 4096
"""Most tokens of one forward pass (rows x longest row) where answers are compared."""


@dataclass(frozen=True)
class Tried:
    """What became of a question.

    Attributes:
        answer: the likeliest answer with the context.
        second: an answer with the context that was drawn at the temperature `SECOND`.
        effect: how much the context changes the answer: KL(p(c) || p) in nats a token on `answer`, of a model on this
            machine; of a server, 1 - likeness of the answers with and without the context.
    """

    answer: str
    second: str
    effect: float


class Asker(ABC):
    """Writes questions, and answers them with and without the context.

    Attributes:
        name: of the model, for the report.
        least_effect: the effect under which the context counts as without influence on an answer.
        window: most tokens of a prompt and its answer; None: not known.
    """

    name: str
    least_effect: float
    window: int | None = None

    @abstractmethod
    def count(self, text: str) -> int:
        """Tokens of a text."""

    @abstractmethod
    def write(self, conversations: Sequence[list[Message]], seed: int, temperature: float) -> list[Written]:
        """One question to each conversation, drawn with this seed at this temperature."""

    @abstractmethod
    def try_out(self, questions: Sequence[str], context: str, seed: int) -> list[Tried]:
        """Answer each question with and without the context."""


class ModelAsker(Asker):
    """A model on this machine.

    Args:
        config: how to load it.
        key: the option that named it, for messages.
        device: where it computes.
        question_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer.

    Raises:
        UserError: the model cannot be loaded, or its chat template takes no context.
    """

    least_effect = 0.1

    def __init__(
        self, config: ModelConfig, key: str, device: torch.device, question_tokens: int, answer_tokens: int
    ) -> None:
        self.name, self._config, self._key, self._device = config.name, config, key, device
        self._tokenizer = load_tokenizer(config, key)
        self._views = Views(self._tokenizer, self._tokenizer, keys=(key, key, "--"))
        self._question_tokens, self.window = question_tokens, context_window(config, key)
        self._answers = [Sampling(answer_tokens, temperature) for temperature in (0.0, SECOND)]
        self._student: Student | None = None
        self._examples = PrefixCache()

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def write(self, conversations: Sequence[list[Message]], seed: int, temperature: float) -> list[Written]:
        """One question to each conversation, drawn with this seed at this temperature."""
        student, sampling = self._load(), Sampling(self._question_tokens, temperature)
        prompts = [prompt_ids(self._views, messages, None, "a question") for messages in conversations]
        longest = max(map(len, prompts)) + sampling.max_new_tokens
        if self.window is not None and longest > self.window:
            raise UserError(
                f"{self._key} {self.name} takes {self.window} tokens, and a prompt with its question has {longest}: "
                "shorten the prompt (--prompts), or the context's sentences"
            )
        # The examples that prompts of one kind begin with are computed once.
        same = takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False))
        shared = torch.tensor([ids[0] for ids in same])
        rows = [torch.tensor(prompt) for prompt in prompts]
        with torch.no_grad(), eval_mode(student.model), own_precision(student.model):
            prefixes = self._examples.encoded(student.model, [shared] * len(rows), rows)
        torch.manual_seed(seed)
        responses = generate(student.model, rows, sampling, student.eos_ids, student.pad_id, prefixes)
        cut_off = [int(response[-1]) not in student.eos_ids for response in responses]
        texts = [self._text(response.tolist()) for response in responses]
        return [Written(text, len(ids), cut) for text, ids, cut in zip(texts, responses, cut_off, strict=True)]

    @torch.no_grad()
    def try_out(self, questions: Sequence[str], context: str, seed: int) -> list[Tried]:
        """Answer each question with and without the context."""
        student, teacher = self._load(), self._teacher
        torch.manual_seed(seed)
        examples = [Example(text, None, None, None, number, "a question") for number, text in enumerate(questions)]
        batch = Batch.encoded(examples, [context] * len(examples), {None: self._views}).to(self._device)
        first, second = (
            teacher.generate(batch, sampling, student.eos_ids, student.pad_id) for sampling in self._answers
        )
        trajectories = Trajectories.of(batch, first, student.eos_ids)
        said = teacher.score(trajectories, MAX_TOKENS)
        found = FixedResponses.of(trajectories, said, student.vocabulary).divergences(student, MAX_TOKENS)
        texts = ([self._text(response.tolist()) for response in responses] for responses in (first, second))
        effects = (nats / tokens for nats, tokens in zip(found.nats, found.tokens, strict=True))
        return [Tried(*values) for values in zip(*texts, effects, strict=True)]

    def _load(self) -> Student:
        if self._student is None:
            model = load_model(self._config, key=self._key, device=self._device).to(self._device)  # type: ignore[arg-type]
            self._student = Student(model.eval(), self._tokenizer)
            self._teacher = SelfTeacher()
            self._teacher.setup(self._student, self._config, self._device)
            self._teacher.share_contexts("auto", 2048)
            self._teacher.prefix.use("frozen")
            self._examples.use("frozen")
        return self._student

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()


class TriedOutBy(Asker):
    """One model writes the questions, and the one that will be trained answers them.

    Args:
        writer: writes.
        student: answers.
    """

    def __init__(self, writer: Asker, student: ModelAsker) -> None:
        self._writer, self._student = writer, student
        self.name, self.least_effect = f"{writer.name}, tried out by {student.name}", student.least_effect
        self.window = min((asker.window for asker in (writer, student) if asker.window is not None), default=None)

    def count(self, text: str) -> int:
        """Tokens of a text, by the student's tokenizer."""
        return self._student.count(text)

    def write(self, conversations: Sequence[list[Message]], seed: int, temperature: float) -> list[Written]:
        """One question to each conversation, by the writer."""
        return self._writer.write(conversations, seed, temperature)

    def try_out(self, questions: Sequence[str], context: str, seed: int) -> list[Tried]:
        """Answer each question with and without the context, by the student."""
        return self._student.try_out(questions, context, seed)


class ServerAsker(Asker):
    """A model behind a server that speaks the OpenAI protocol (`POST /v1/chat/completions`).

    Args:
        server: its address and patience.
        model: its name there.
        question_tokens: most tokens of a question.
        answer_tokens: most tokens of an answer.
    """

    least_effect = 0.2

    def __init__(self, server: Server, model: str, question_tokens: int, answer_tokens: int) -> None:
        self.server, self.name = server, model
        self._question_tokens, self._answer_tokens = question_tokens, answer_tokens

    def count(self, text: str) -> int:
        """About how many tokens a text has: the server's tokenizer is not known, and 4 characters are one of most."""
        return len(text) // 4 + 1

    def write(self, conversations: Sequence[list[Message]], seed: int, temperature: float) -> list[Written]:
        """One question to each conversation; a server that takes a seed repeats them."""
        return self._chat(conversations, Sampling(self._question_tokens, temperature), seed)

    def try_out(self, questions: Sequence[str], context: str, seed: int) -> list[Tried]:
        """Answer each question with and without the context."""
        asked = [[{"role": "user", "content": question}] for question in questions]
        seeing = [[{"role": "system", "content": context}, *messages] for messages in asked]
        greedy, drawn = Sampling(self._answer_tokens, 0.0), Sampling(self._answer_tokens, SECOND)
        first, second = self._chat(seeing, greedy, seed), self._chat(seeing, drawn, seed)
        without = self._chat(asked, greedy, seed)
        return [
            Tried(one.text, two.text, 1 - likeness(one.text, three.text))
            for one, two, three in zip(first, second, without, strict=True)
        ]

    def _chat(self, conversations: Sequence[list[Message]], sampling: Sampling, seed: int) -> list[Written]:
        bodies = [
            {
                "model": self.name,
                "messages": messages,
                "max_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": seed + number,
            }
            for number, messages in enumerate(conversations)
        ]
        try:
            return self.server.post(CHAT, bodies, _written)
        except ServerError as error:
            raise UserError(f"--server: {error}; what was written so far is kept: the same command resumes") from error


def _written(answer: object, _: int) -> Written:
    """The text of a chat completion."""
    try:
        choice = answer["choices"][0]  # type: ignore[index]
        text, reason = choice["message"]["content"], choice.get("finish_reason")
        tokens = answer.get("usage", {}).get("completion_tokens", 0)  # type: ignore[attr-defined]
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ServerError(f"{CHAT} gave no chat completion, but {str(answer)[:200]}") from error
    return Written(str(text or "").strip(), int(tokens or 0), reason == "length")
