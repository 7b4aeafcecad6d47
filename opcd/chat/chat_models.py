"""Who answers in a chat: models, each with the context in its prompt or without."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from opcd.data import Placement, Views
from opcd.data.example import Message
from opcd.evaluation.batched_answers import prompt_ids
from opcd.models import ModelConfig, base_of, context_window, load_model, load_tokenizer, saved_model_config
from opcd.models.model_folder import explain
from opcd.modules.answering import respond
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student
from opcd.results.run_files import read_config
from opcd.runtime.errors import UserError

THOUGHT = re.compile(r"<think>.*?</think>\s*", re.DOTALL)
"""What chat templates leave out of earlier answers."""


@dataclass(frozen=True)
class Origin:
    """What MODEL names.

    Attributes:
        config: how to load it.
        base: the model that it was made from, where that is known.
        data: how the run placed the context, where it is a run's.
    """

    config: ModelConfig
    base: ModelConfig | None
    data: dict[str, Any]

    @classmethod
    def of(
        cls, name: str, key: str = "MODEL", trust_remote_code: bool = False, pickled_weights: bool = False
    ) -> "Origin":
        """A run's folder is its student, made from its model.student; an adapter is made from its base.

        Raises:
            UserError: the run has no student (yet), its config cannot be read, or it asks for what is not allowed here.
        """
        made = partial(ModelConfig, trust_remote_code=trust_remote_code, pickled_weights=pickled_weights)
        folder = Path(name).expanduser()
        run = folder.parent if folder.name.startswith("student") else folder
        if not (run / "config.yaml").is_file():
            base = base_of(name, key)
            return cls(made(name), made(base) if base != name else None, {})
        config, where = read_config(run), f"{key}: {run / 'config.yaml'}"
        try:
            values, data = config["model"]["student"], dict(config["data"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where} is no config of `opcd fit`: {explain(error)}") from error
        placement, template = data.get("placement", "system"), data.get("template")
        if placement not in get_args(Placement) or not isinstance(template, str | None):
            raise UserError(
                f"{where} has no data.placement and data.template of this opcd: {placement!r}, {template!r}"
            )
        before = saved_model_config(values, where, trust_remote_code, pickled_weights)
        kwargs = before.chat_template_kwargs
        return cls(made(str(_student(folder, key)), chat_template_kwargs=kwargs), before, data)


def _student(folder: Path, key: str) -> Path:
    """The student's folder itself, or that of a run.

    Raises:
        UserError: there is none; names those that the run has written on the way.
    """
    if folder.name.startswith("student"):
        return folder
    if not (folder / "student").is_dir():
        steps = sorted(student.name for student in folder.glob("student-step=*"))
        hint = f"; it has {', '.join(steps)}: name one" if steps else "; it is written when training ends"
        raise UserError(f"{key}: {folder.resolve()} has no student{hint}")
    return folder / "student"


class Source:
    """A model whose tokenizer is read, and whose weights come with `load`.

    Args:
        config: how to load it.
        key: what the user named it by, for messages.
    """

    def __init__(self, config: ModelConfig, key: str) -> None:
        self.config, self.key = config, key
        self.tokenizer, self.window = load_tokenizer(config, key), context_window(config, key)
        self.student: Student | None = None

    def load(self, device: torch.device) -> None:
        """Load the weights, once."""
        if self.student is None:
            model = load_model(self.config, key=self.key, device=device).to(device)  # type: ignore[arg-type]
            self.student = Student(model, self.tokenizer)


class Speaker:
    """A model that answers, with the context in its prompt or without.

    Args:
        title: what to call it.
        source: the model; several speakers can have the same.
        context: what stands in its prompts; None: nothing.
        placement: the context's place, as in training.
        template: joins context and query, as in training.

    Raises:
        UserError: the chat template does not fit.
    """

    def __init__(
        self, title: str, source: Source, context: str | None, placement: Placement, template: str | None
    ) -> None:
        self.title, self.source, self.context = title, source, context
        if context is None:  # where it would stand is not asked for: a template need not have a system role
            placement, template = "raw" if placement == "raw" else "user", None
        kwargs = None if placement == "raw" else source.config.chat_template_kwargs
        keys = (source.key, source.key, "--")
        self.views = Views(source.tokenizer, source.tokenizer, placement, template, kwargs, kwargs, keys)
        self.prefix = PrefixCache()
        self.turns: list[Message] = []
        """What was asked and answered before, where the conversation goes on."""

    @property
    def takes_turns(self) -> bool:
        """Whether a prompt can hold what was said before: that takes a chat template."""
        return self.views.placement != "raw"

    def answer(self, question: str, sampling: Sampling, show: Callable[[str], None], remember: bool = False) -> str:
        """The answer; with every token `show` is given all that is written.

        Args:
            question: stands after `turns`.
            sampling: how tokens are drawn.
            show: is given the text so far.
            remember: add question and answer to `turns`.

        Raises:
            UserError: the question does not fit the chat template or the model's window.
        """
        assert self.source.student is not None, "load first"
        asked: Message = {"role": "user", "content": question}
        query = [*self.turns, asked] if self.turns else question
        ids = prompt_ids(self.views, query, self.context, "the question")
        longest, window = len(ids) + sampling.max_new_tokens, self.source.window
        if window is not None and longest > window:
            raise UserError(
                f"{self.title} takes {window} tokens, and prompt and answer may have {longest}: ask in fewer words, "
                "/reset the conversation, or lower --max_new_tokens"
            )
        written: list[int] = []

        def told(rows: Tensor, tokens: Tensor) -> None:
            """Show a token more, but not half of a character."""
            written.extend(tokens.tolist())
            show(self._text(written).rstrip("\N{REPLACEMENT CHARACTER}"))

        respond(self.source.student, self.views, [ids], self.context, sampling, self.prefix, told)
        answer = self._text(written)
        if remember:
            self.turns += [asked, {"role": "assistant", "content": THOUGHT.sub("", answer)}]
        return answer

    def _text(self, ids: list[int]) -> str:
        return str(self.source.tokenizer.decode(ids, skip_special_tokens=True)).strip()
