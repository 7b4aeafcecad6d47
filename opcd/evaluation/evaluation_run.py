"""One evaluation: the constructor reads and checks tasks and prompts, a call asks a model."""

import logging
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from functools import partial
from io import StringIO
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from opcd.data import Placement, Views
from opcd.data.contexts import context_hash, read_context
from opcd.evaluation.batched_answers import Answering, rank_and_ranks
from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.game_tasks import GameRows, game_rows
from opcd.evaluation.scores import Results, TaskResult, summarise
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
from opcd.runtime.generators import generators_kept

EVERY_ANSWER = ("cut_off", "response_tokens")
"""Metrics of all tasks that generate text: share of answers that the token limit ended, and mean tokens."""
DRAWING = ("temperature", "top_p", "top_k")
NO_WINDOW = 2048
"""Window in tokens if the config has none, as in lm-eval: longer texts are scored in windows of this size."""

Show = Callable[[str, int], None]
"""A callback for progress: a task's name, and the number of answers since the last call."""


class Evaluator:
    """Asks a model the questions of an evaluation, without an effect on the model or the random generators.

    Args:
        evaluation: the tasks, and how answers are drawn.
        model: the config of the model to ask. Its weights are not loaded here.
        key: the config key of the model, for messages.
        prefix: prefix of the keys of `evaluation` in messages.

    Raises:
        UserError: lm-eval is not installed, a task is unknown, a row or the context is wrong, the model has no chat
            template, or the prompts do not fit into its window.
    """

    def __init__(self, evaluation: Evaluation, model: ModelConfig, key: str = "model", prefix: str = "") -> None:
        if not all(isinstance(evaluation.data.get(name), GameSeeds) for name in evaluation.tasks):
            for package in ("lm_eval", "math_verify"):
                require("evaluation", package, "evaluation")
        self.evaluation, self.model, self.key, self.prefix = evaluation, model, key, prefix
        given = evaluation.context
        self.context = None if given is None else read_context(given, f"{prefix}context")
        with _quiet():
            self.tasks = load_tasks(evaluation, prefix)
        self._refuse_unused_options()
        tokenizer, self._window = load_tokenizer(model, key), context_window(model, key)
        self._kwargs = {task.name: self._template_kwargs(task, tokenizer) for task in self.tasks}
        self._views = {task.name: self._make_views(task, tokenizer) for task in self.tasks}
        self._prompts = {
            task.name: Prompts(self._views[task.name], tokenizer, self.context, evaluation.template)
            for task in self.tasks
        }
        self._samplings = {task.name: self._sampling(task) for task in self.tasks}

    def __call__(self, student: Student, show: Show = lambda task, done: None) -> Results:
        """The results of every task on rank 0, and none on the others. Every rank must call this.

        Args:
            student: the model to ask, with weights of any type.
            show: called with the progress.
        """
        results: Results = {}
        with generators_kept():
            for task in self.tasks:
                if result := self._result(task, student, partial(show, task.name)):
                    results[task.name] = result
        return results

    @property
    def answers(self) -> dict[str, int]:
        """The number of answers of each task."""
        return {task.name: len(task) * self.evaluation.samples for task in self.tasks}

    def main_metric(self, task: str) -> str:
        """The first metric of a task."""
        return self._task(task).metrics[0]

    def row_metrics(self, task: str) -> list[str]:
        """The metrics of a task that every answer has a score for."""
        rows = self._task(task)
        return [*rows.row_metrics, *(["cut_off"] if rows.generates else [])]

    def higher_is_better(self, task: str) -> bool:
        """Whether a larger value of a task's first metric is better."""
        return self._task(task).higher_is_better

    def settings(self) -> dict[str, Any]:
        """All settings that the results depend on, except the model and the seed."""
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
        how = {"num_fewshot": task.task.config.num_fewshot or 0, "apply_chat_template": task.chat}
        how |= {"file": task.file, "version": task.task.VERSION}
        return settings | (drawn if task.generates else {}) | (chat if task.chat else {}) | how

    def _result(self, task: TaskRows | GameRows, student: Student, show: Callable[[int], None]) -> TaskResult | None:
        """The result of a task on rank 0, None on the others."""
        config, numbers = self.evaluation, range(self.evaluation.samples)
        views, sampling = self._views[task.name], self._samplings[task.name]
        prefix = PrefixCache(config.shared_prefix)
        answering = Answering(student, views, self.context, sampling, config.batch_size, prefix)
        if isinstance(task, GameRows):
            plays = [game_rows(task, number, answering, self._seed(task, number), show) for number in numbers]
            rows = sorted((row for play in plays for row in play), key=lambda row: (row["index"], row["sample"]))
            scored, others = [*task.metrics], {}
        else:
            passes = [found for number in numbers if (found := self._asked(task, number, answering, show))]
            rows, scored = scored_rows(task, passes)
            others = without_scores(task, passes, scored)
        if not rows:
            return None
        measured = [row | {"response_tokens": row.get("tokens")} for row in rows]
        metrics = summarise(measured, [*scored, *(EVERY_ANSWER if task.generates else ())]) | others
        order = {name: metrics[name] for name in task.metrics if name in metrics}
        return TaskResult(len(task), order | metrics, rows, self._task_settings(task))

    def _asked(self, task: TaskRows, number: int, answering: Answering, show: Callable[[int], None]) -> Found | None:
        """One answer to each question, scored by lm-eval; None on ranks other than the first."""
        from lm_eval.evaluator import evaluate  # simple_evaluate takes 3 s each time to report on the machine

        from opcd.evaluation.lm_eval_model import AnsweringModel

        prompts = self._prompts[task.name]
        model = AnsweringModel(answering, prompts, self._window or NO_WINDOW, show)
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
        """A seed for each task, sample and rank. Also seeds the generators that a task's scoring may use."""
        entropy = [self.evaluation.seed, zlib.crc32(task.name.encode()), number, rank_and_ranks()[0]]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        return seed

    def _template_kwargs(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        chosen = self.evaluation.chat_template_kwargs
        kwargs = dict(self.model.chat_template_kwargs if chosen is None else chosen)
        if task.thinking is not None and "enable_thinking" in str(tokenizer.chat_template):
            kwargs.setdefault("enable_thinking", task.thinking)
        return kwargs

    def _make_views(self, task: TaskRows | GameRows, tokenizer: PreTrainedTokenizerBase) -> Views:
        kwargs = self._kwargs[task.name] if task.chat else None
        # Without a context, placement user makes no demand: a chat template need not have a system role.
        placement: Placement = (self.evaluation.placement if self.context else "user") if task.chat else "raw"
        keys = (self.key, self.key, self.prefix)
        return Views(tokenizer, tokenizer, placement, self.evaluation.template, kwargs, kwargs, keys)

    def _sampling(self, task: TaskRows | GameRows) -> Sampling:
        """The sampling of a task's answers: the evaluation's settings, then those of the task's YAML."""
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
        """The token limit of an answer. UserError if the longest prompt leaves no room for an answer."""
        window, chosen = self._window, self.evaluation.max_new_tokens
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

    def _refuse_unused_options(self) -> None:
        for task in self.tasks:
            scored_alone = isinstance(task, TaskRows) and task.task.OUTPUT_TYPE == "loglikelihood_rolling"
            if scored_alone and self.evaluation.context is not None:
                raise UserError(
                    f"{self.prefix}context has no effect on {task.name}, which scores texts without a prompt"
                )
        if any(task.generates for task in self.tasks):
            return
        for name in (*DRAWING, "greedy", "max_new_tokens"):
            if getattr(self.evaluation, name) not in (None, False):
                names = ", ".join(task.name for task in self.tasks)
                raise UserError(f"{self.prefix}{name} has no effect: no text is generated for {names}; remove it")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide lm-eval's log lines and progress bars, and issue warnings after the block."""
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
