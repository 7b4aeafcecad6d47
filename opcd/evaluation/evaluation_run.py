"""One evaluation: tasks and prompts are read and checked when it is made, models are asked when it is called."""

import logging
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from typing import Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from transformers import PreTrainedTokenizerBase

from opcd.data import Views
from opcd.data.contexts import context_hash, read_context
from opcd.evaluation.batched_answers import Answering, prompt_ids
from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.game_tasks import GameRows, game_rows, rank_and_ranks
from opcd.evaluation.scores import Results, Row, TaskResult, summarise
from opcd.evaluation.task_loading import KNOWN, TaskRows, load_tasks
from opcd.evaluation.task_prompts import Prompts
from opcd.evaluation.task_rows import Found, scored_rows, without_scores
from opcd.games import GameSeeds
from opcd.models import ModelConfig, context_window, load_tokenizer
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

EVERY_ANSWER = ("cut_off", "response_tokens")
"""Metrics of every task that generates text: share of answers that the limit ended, and mean length in tokens."""
DRAWING = ("temperature", "top_p", "top_k")
NO_WINDOW = 2048
"""Tokens of a model whose config states no window, as in lm-eval; texts that are scored whole are divided by it."""

Show = Callable[[str, int], None]
"""Called with a task's name and a number of answers, when so many more are done."""


class Evaluator:
    """Asks a model the questions of an evaluation, and leaves model and generators as they were.

    Args:
        evaluation: what to ask, and how.
        model: the config of the model that will be asked; its weights are not loaded here.
        key: its config key, for messages.
        prefix: what stands before the keys of `evaluation` in messages.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, a row or the context is wrong, the model has no chat
            template, or the prompts do not fit into its window.
    """

    def __init__(self, evaluation: Evaluation, model: ModelConfig, key: str = "model", prefix: str = "") -> None:
        _check_packages(evaluation)
        self.evaluation, self.model, self.key, self.prefix = evaluation, model, key, prefix
        given = evaluation.context
        self.context = None if given is None else read_context(given, f"{prefix}context")
        with _quiet():
            self.tasks = load_tasks(evaluation, prefix)
        _refuse_idle(evaluation, self.tasks, prefix)
        tokenizer, self._window = load_tokenizer(model, key), context_window(model, key)
        self._kwargs = {task.name: self._template_kwargs(task, tokenizer) for task in self.tasks}
        self._views = {task.name: self._make_views(task, tokenizer) for task in self.tasks}
        self._prompts = {
            task.name: Prompts(self._views[task.name], tokenizer, self.context, evaluation.template)
            for task in self.tasks
        }
        self._samplings = {task.name: self._sampling(task) for task in self.tasks}

    def __call__(self, student: Student, show: Show = lambda task, done: None) -> Results:
        """Results of every task; none on ranks other than the first. Every rank of a process group must call it.

        Args:
            student: the model, whose weights answer in the type that they have.
            show: told of the progress.
        """
        results: Results = {}
        with generators_kept():
            for task in self.tasks:
                prefix = PrefixCache(self.evaluation.shared_prefix)
                numbers = range(self.evaluation.samples)
                if isinstance(task, GameRows):
                    rows = [row for number in numbers for row in self._played(task, number, student, prefix, show)]
                    if rows:
                        results[task.name] = self._game_result(task, rows)
                    continue
                passes = [self._asked(task, number, student, prefix, show) for number in numbers]
                if found := [one for one in passes if one is not None]:
                    results[task.name] = self._result(task, found)
        return results

    @property
    def answers(self) -> dict[str, int]:
        """How many answers each task takes."""
        return {task.name: len(task) * self.evaluation.samples for task in self.tasks}

    def main_metric(self, task: str) -> str:
        """The first metric of a task."""
        return self._task(task).metrics[0]

    def row_metrics(self, task: str) -> list[str]:
        """Metrics of a task that every answer has a score for."""
        rows = self._task(task)
        return [*rows.row_metrics, *(["cut_off"] if isinstance(rows, GameRows) or rows.generates else [])]

    def higher_is_better(self, task: str) -> bool:
        """Whether more of a task's first metric is better."""
        return self._task(task).higher_is_better

    def settings(self) -> dict[str, Any]:
        """What the results depend on, but for the model and the seed."""
        evaluation = self.evaluation
        return {
            "limit": evaluation.limit,
            "samples": evaluation.samples,
            "batch_size": evaluation.batch_size,
            "placement": evaluation.placement if self.context else None,
            "template": evaluation.template,
            "context_sha256": context_hash([self.context]) if self.context else None,
            "shared_prefix": evaluation.shared_prefix if self.context else None,
            "tasks": {task.name: self._task_settings(task) for task in self.tasks},
        }

    def _task(self, name: str) -> TaskRows | GameRows:
        return next(task for task in self.tasks if task.name == name)

    def _task_settings(self, task: TaskRows | GameRows) -> dict[str, Any]:
        sampling, settings = self._samplings[task.name], {"data": task.source}
        chat = {"chat_template_kwargs": self._kwargs[task.name]}
        drawn = {name: getattr(sampling, name) for name in (*DRAWING, "max_new_tokens")}
        if isinstance(task, GameRows):
            return settings | drawn | chat
        config = task.task.config
        asked = {"num_fewshot": config.num_fewshot or 0, "apply_chat_template": self._prompts[task.name].chat}
        known = {"file": task.file, "version": task.task.VERSION}
        return (
            settings
            | (drawn if task.generates else {})
            | (chat if asked["apply_chat_template"] else {})
            | asked
            | known
        )

    def _answering(self, task: TaskRows | GameRows, student: Student, prefix: PrefixCache) -> Answering:
        views, sampling = self._views[task.name], self._samplings[task.name]
        return Answering(student, views, self.context, sampling, self.evaluation.batch_size, prefix)

    def _played(self, task: GameRows, number: int, student: Student, prefix: PrefixCache, show: Show) -> list[Row]:
        """One play of each game, scored; nothing on ranks other than the first."""
        answering = self._answering(task, student, prefix)
        return game_rows(task, number, answering, self._seed(task, number), lambda done: show(task.name, done))

    def _asked(self, task: TaskRows, number: int, student: Student, prefix: PrefixCache, show: Show) -> Found | None:
        """One answer to each question, scored; None on ranks other than the first."""
        from lm_eval.evaluator import evaluate  # not simple_evaluate: that reports on the machine for 3 s each time

        from opcd.evaluation.lm_eval_model import AnsweringModel

        prompts, answering = self._prompts[task.name], self._answering(task, student, prefix)
        model = AnsweringModel(answering, prompts, self._window or NO_WINDOW, lambda done: show(task.name, done))
        model.seed = self._seed(task, number)
        task.prepare()
        prompts.source = task.name
        with _quiet():
            found: Found | None = evaluate(
                lm=model,
                task_dict={"tasks": {task.name: task.task}},
                limit=len(task),
                bootstrap_iters=0,
                apply_chat_template=prompts.chat,
                fewshot_as_multiturn=prompts.chat,
            )
        return found

    def _seed(self, task: TaskRows | GameRows, number: int) -> int:
        """Another one for each task, sample and rank; seeds the generators that a task's checks may draw from, too."""
        entropy = [self.evaluation.seed, zlib.crc32(task.name.encode()), number, rank_and_ranks()[0]]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return seed

    def _result(self, task: TaskRows, passes: list[Found]) -> TaskResult:
        rows, scored = scored_rows(task, passes)
        metrics = summarise(_with_length(rows), [*scored, *(EVERY_ANSWER if task.generates else ())])
        metrics |= without_scores(task, passes, scored)
        order = {name: metrics[name] for name in task.metrics if name in metrics}
        return TaskResult(len(task), order | metrics, rows, self._task_settings(task))

    def _game_result(self, task: GameRows, rows: list[Row]) -> TaskResult:
        rows = sorted(rows, key=lambda row: (row["index"], row["sample"]))
        metrics = summarise(_with_length(rows), [*task.metrics, *EVERY_ANSWER])
        return TaskResult(len(task), metrics, rows, self._task_settings(task))

    def _template_kwargs(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        chosen = self.evaluation.chat_template_kwargs
        kwargs = dict(self.model.chat_template_kwargs if chosen is None else chosen)
        if task.thinking is not None and "enable_thinking" in str(tokenizer.chat_template):
            kwargs.setdefault("enable_thinking", task.thinking)
        return kwargs

    def _make_views(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> Views:
        keys = (self.key, self.key, self.prefix)
        if not self._is_chat(task):
            return Views(tokenizer, tokenizer, "raw", self.evaluation.template, None, None, keys)
        # Without a context its place is not asked for: a template need not have a system role.
        placement = self.evaluation.placement if self.context else "user"
        kwargs = self._kwargs[task.name]
        return Views(tokenizer, tokenizer, placement, self.evaluation.template, kwargs, kwargs, keys)

    def _is_chat(self, task: TaskRows | GameRows) -> bool:
        """Whether the task is asked through the chat template."""
        if isinstance(task, GameRows):
            return True
        if (chosen := self.evaluation.apply_chat_template) is not None:
            return chosen
        return task.generates if task.chat is None else task.chat

    def _sampling(self, task: TaskRows | GameRows) -> Sampling:
        """How the task is answered: as its YAML says, but for what the evaluation says."""
        evaluation, given = self.evaluation, task.generation
        most = self._most_tokens(task)
        chosen = {name: getattr(evaluation, name) for name in DRAWING if getattr(evaluation, name) is not None}
        drawn = bool(given) and (given["do_sample"] or bool(chosen)) and not evaluation.greedy
        if evaluation.samples > 1 and not drawn:
            hint = f"set {self.prefix}temperature, or " if given else ""
            raise UserError(
                f"{self.prefix}samples: the answers to {task.name} are the same each time; {hint}leave samples at 1"
            )
        options = {name: value for name, value in given.items() if name not in KNOWN}
        if not drawn:
            return Sampling(max_new_tokens=most, temperature=0.0, options=options)
        own = {name: given[name] for name in DRAWING if name in given and given["do_sample"]}
        return Sampling(max_new_tokens=most, **own | chosen, options=options)

    def _most_tokens(self, task: TaskRows | GameRows) -> int:
        """Most tokens of an answer. UserError where the longest prompt leaves no room for it."""
        window, chosen = self._window, self.evaluation.max_new_tokens
        if isinstance(task, GameRows):
            views = self._views[task.name]
            longest = whole = task.longest_prompt(
                lambda query, where: len(prompt_ids(views, query, self.context, where))
            )
        else:
            longest, whole = task.longest_request(self._prompts[task.name])
            if not task.generates:
                if window is not None and whole > window:
                    raise UserError(
                        f"{self.key}.name: {self.model.name} takes {window} tokens, but the longest prompt of "
                        f"{task.name}, with the text that is scored, has {whole}; shorten the context"
                    )
                return 1
        if window is None:
            return chosen or int(task.generation["max_gen_toks"])
        left = window - longest
        if left < (chosen or 1):
            raise UserError(
                f"{self.key}.name: {self.model.name} takes {window} tokens, but the longest prompt of {task.name} has "
                f"{longest} and up to {chosen or 1} are added; shorten the context, or set {self.prefix}max_new_tokens"
            )
        return chosen or min(int(task.generation["max_gen_toks"]), left)


@contextmanager
def generators_kept() -> Iterator[None]:
    """A block after which all generators are as before, also where a signal or an error ends it."""
    kept = isolate_rng()  # Lightning's own restores nothing then
    kept.__enter__()
    try:
        yield
    finally:
        kept.__exit__(None, None, None)


def _check_packages(evaluation: Evaluation) -> None:
    if all(isinstance(evaluation.data.get(name), GameSeeds) for name in evaluation.tasks):
        return
    for package in ("lm_eval", "math_verify"):
        require("evaluation", package, "evaluation")


def _refuse_idle(evaluation: Evaluation, tasks: list[TaskRows | GameRows], prefix: str) -> None:
    """Refuse options that no task of the evaluation reads."""
    others = [task for task in tasks if isinstance(task, TaskRows)]
    if evaluation.context is not None:
        for task in others:
            if task.task.OUTPUT_TYPE == "loglikelihood_rolling":
                raise UserError(f"{prefix}context has no effect on {task.name}, which scores texts without a prompt")
    if len(others) < len(tasks) or any(task.generates for task in others):
        return
    for name in (*DRAWING, "greedy", "max_new_tokens"):
        if getattr(evaluation, name) not in (None, False):
            names = ", ".join(task.name for task in tasks)
            raise UserError(f"{prefix}{name} has no effect: no text is generated for {names}; remove it")


def _with_length(rows: list[Row]) -> list[Row]:
    """The rows with their length as a metric, where text was generated."""
    return [row | ({"response_tokens": row["tokens"]} if "tokens" in row else {}) for row in rows]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log lines and progress bars, which tell of what is meant to be so; warnings come afterwards."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught, redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
