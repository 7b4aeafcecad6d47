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
from opcd.evaluation.task_loading import TaskRows, load_tasks
from opcd.games import GameSeeds
from opcd.models import ModelConfig, context_window, load_tokenizer
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import PrefixCache
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.runtime.extras import require

EVERY_ANSWER = ("cut_off", "response_tokens")
"""Metrics of every task: share of answers that the limit ended, and mean length in tokens."""

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
        tokenizer, window = load_tokenizer(model, key), context_window(model, key)
        self._kwargs = {task.name: self._template_kwargs(task, tokenizer) for task in self.tasks}
        self._views = {task.name: self._make_views(task, tokenizer) for task in self.tasks}
        self._samplings = {task.name: self._sampling(task, window) for task in self.tasks}

    def __call__(self, student: Student, show: Show = lambda task, done: None) -> Results:
        """Results of every task; none on ranks other than the first. Every rank of a process group must call it.

        Args:
            student: the model, whose weights answer in the type that they have.
            show: told of the progress.
        """
        results: Results = {}
        with generators_kept():
            for task in self.tasks:
                rows: list[Row] = []
                prefix = PrefixCache(self.evaluation.shared_prefix)
                for number in range(self.evaluation.samples):
                    rows += self._answers(task, number, student, prefix, show)
                if rows:
                    results[task.name] = self._result(task, rows)
        return results

    @property
    def answers(self) -> dict[str, int]:
        """How many answers each task takes."""
        return {task.name: len(task) * self.evaluation.samples for task in self.tasks}

    def main_metric(self, task: str) -> str:
        """The first metric of a task."""
        return next(rows.metrics[0] for rows in self.tasks if rows.name == task)

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

    def _task_settings(self, task: TaskRows | GameRows) -> dict[str, Any]:
        sampling = self._samplings[task.name]
        drawn = {name: getattr(sampling, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")}
        return {"data": task.source, **drawn, "chat_template_kwargs": self._kwargs[task.name]}

    def _answers(
        self, task: TaskRows | GameRows, number: int, student: Student, prefix: PrefixCache, show: Show
    ) -> list[Row]:
        """One answer to each question, or one play of each game, scored; nothing on ranks other than the first."""
        answering = Answering(
            student,
            self._views[task.name],
            self.context,
            self._samplings[task.name],
            self.evaluation.batch_size,
            prefix,
        )
        seed = self._seed(task, number)
        if isinstance(task, GameRows):
            return game_rows(task, number, answering, seed, lambda done: show(task.name, done))
        from lm_eval.evaluator import evaluate  # not simple_evaluate: that reports on the machine for 3 s each time

        from opcd.evaluation.lm_eval_model import AnsweringModel

        model = AnsweringModel(answering, lambda done: show(task.name, done))
        model.seed = seed
        with _quiet():
            found = evaluate(
                lm=model,
                task_dict={"tasks": {task.name: task.task}},
                limit=len(task),
                bootstrap_iters=0,
                apply_chat_template=True,
                fewshot_as_multiturn=True,
            )
        samples = found["samples"][task.name] if found else []
        return [_row(task, sample, number) for sample in samples]

    def _seed(self, task: TaskRows | GameRows, number: int) -> int:
        """Another one for each task, sample and rank; seeds the generators that a task's checks may draw from, too."""
        entropy = [self.evaluation.seed, zlib.crc32(task.name.encode()), number, rank_and_ranks()[0]]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return seed

    def _result(self, task: TaskRows | GameRows, rows: list[Row]) -> TaskResult:
        rows = sorted(rows, key=lambda row: (row["index"], row["sample"]))
        scored = [row | {"response_tokens": row["tokens"]} for row in rows]
        return TaskResult(
            n=len(rows) // self.evaluation.samples,
            metrics=summarise(scored, [*task.metrics, *EVERY_ANSWER]),
            rows=rows,
            settings=self._task_settings(task),
        )

    def _template_kwargs(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        chosen = self.evaluation.chat_template_kwargs
        kwargs = dict(self.model.chat_template_kwargs if chosen is None else chosen)
        if task.thinking is not None and "enable_thinking" in str(tokenizer.chat_template):
            kwargs.setdefault("enable_thinking", task.thinking)
        return kwargs

    def _make_views(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> Views:
        # Without a context its place is not asked for: a template need not have a system role.
        placement = self.evaluation.placement if self.context else "user"
        kwargs = self._kwargs[task.name]
        keys = (self.key, self.key, self.prefix)
        return Views(tokenizer, tokenizer, placement, self.evaluation.template, kwargs, kwargs, keys)

    def _sampling(self, task: TaskRows | GameRows, window: int | None) -> Sampling:
        """How the task is answered: as its YAML says, but for what the evaluation says."""
        evaluation = self.evaluation
        most = self._most_tokens(task, window)
        if evaluation.greedy or not task.generation["do_sample"]:
            return Sampling(max_new_tokens=most, temperature=0.0)
        names = ("temperature", "top_p", "top_k")
        chosen = {name: getattr(evaluation, name) for name in names if getattr(evaluation, name) is not None}
        return Sampling(max_new_tokens=most, **{name: task.generation[name] for name in names} | chosen)

    def _most_tokens(self, task: TaskRows | GameRows, window: int | None) -> int:
        views = self._views[task.name]
        longest = task.longest_prompt(lambda query, where: len(prompt_ids(views, query, self.context, where)))
        chosen = self.evaluation.max_new_tokens
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


def _row(task: TaskRows, sample: dict[str, Any], number: int) -> Row:
    answer = sample["resps"][0][0]
    return {
        "index": sample["doc_id"],
        "sample": number,
        "query": task.task.doc_to_text(sample["doc"]),
        "response": str(answer),
        "reference": sample["target"],
        **{name: _plain(sample[name]) for name in task.metrics},
        "tokens": answer.tokens,
        "cut_off": answer.cut_off,
    }


def _plain(score: Any) -> Any:
    return [bool(value) for value in score] if isinstance(score, list) else bool(score)


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
