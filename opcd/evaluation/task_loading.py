"""The tasks of an evaluation with their rows, as lm-eval's task objects."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.game_tasks import GameRows
from opcd.evaluation.task_index import manager_for, shown_file
from opcd.evaluation.task_prompts import Prompts
from opcd.games import GameSeeds
from opcd.games.game_seeds import as_game
from opcd.models.hub_access import hub_reachable
from opcd.modules.lm.generation import OPTIONS
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError

FEWSHOT_SEED = 1234
"""lm-eval's default, so that the same few-shot examples precede a question."""
LOCAL = ("arrow", "csv", "json", "pandas", "parquet", "text")
"""Loaders of the library `datasets` that read the user's own files."""
KNOWN = ("until", "do_sample", "temperature", "top_p", "top_k", "max_gen_toks")
"""Settings of `generation_kwargs`, in addition to `Sampling.options`."""


@dataclass(frozen=True)
class TaskRows:
    """A task of lm-eval that has read its rows.

    Attributes:
        name: the task's name.
        task: lm-eval's ConfigurableTask.
        file: the YAML file that defines the task.
        source: where the rows come from.
        count: number of rows to ask.
        filters: names of lm-eval's filters of the answers.
        metrics: names of the metrics, the main one first; METRIC,FILTER if there are several filters.
        generation: how answers are drawn by default, in lm-eval's words; empty if nothing is generated.
        thinking: false if models that can switch thinking off should do so.
        chat: whether the chat template is applied.
    """

    name: str
    task: Any
    file: str
    source: str
    count: int
    filters: list[str]
    metrics: list[str]
    generation: dict[str, Any]
    thinking: bool | None
    chat: bool

    def __len__(self) -> int:
        return self.count

    @property
    def generates(self) -> bool:
        """Whether answers are generated; if not, log-likelihoods of given texts are compared."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")

    @property
    def row_metrics(self) -> list[str]:
        """The metrics whose value is the mean of a score of each row."""
        from lm_eval.api.metrics import mean

        from opcd.tasks.ifeval import share_of_instructions

        averaged = {name for name, how in self.task.aggregation().items() if how in (mean, share_of_instructions)}
        return [name for name in self.metrics if name.partition(",")[0] in averaged]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value of the main metric is better."""
        return bool(self.task.higher_is_better().get(self.metrics[0].partition(",")[0], True))

    def prepare(self) -> None:
        """Restart the draw of few-shot examples, so that every pass over the rows has the same ones."""
        self.task.set_fewshot_seed(FEWSHOT_SEED)

    def longest_request(self, prompts: Prompts) -> tuple[int, int]:
        """Tokens of the longest prompt, and of the longest prompt with a given continuation.

        Raises:
            UserError: a row cannot be asked.
        """
        self.prepare()
        longest, whole = 1, 1
        for number, doc in self.task.doc_iterator(limit=self.count):
            prompts.source = doc.get("source") or f"{self.name}: row {number + 1}"
            for prompt, continuation in self._requests(number, doc, prompts):
                if isinstance(continuation, str):
                    head, tail = prompts.pair(prompt, continuation)
                    longest, whole = max(longest, len(head)), max(whole, len(head) + len(tail) - 1)
                else:
                    longest = max(longest, len(prompts.ids(prompt)))
        return longest, max(longest, whole)

    def _requests(self, number: int, doc: dict[str, Any], prompts: Prompts) -> Iterator[tuple[str, Any]]:
        """(prompt, continuation or generation settings) of a row, as lm-eval builds them."""
        task, how = self.task, {"apply_chat_template": prompts.chat, "chat_template": prompts.render}
        if task.OUTPUT_TYPE == "loglikelihood_rolling":
            return
        few = task.config.num_fewshot or 0
        context = task.fewshot_context(
            doc, num_fewshot=few, fewshot_as_multiturn=prompts.chat, gen_prefix=task.doc_to_prefix(doc), **how
        )
        made = task.construct_requests(doc=doc, ctx=context, metadata=(self.name, number, 1), **how)
        for request in made if isinstance(made, list) else [made]:
            yield request.args[0], request.args[1]


def load_tasks(evaluation: Evaluation, prefix: str = "") -> list[TaskRows | GameRows]:
    """The tasks of an evaluation; a group or a tag of lm-eval gives each of its tasks.

    Args:
        evaluation: which tasks.
        prefix: prefix of config keys in messages.

    Raises:
        UserError: a task is unknown or of an unsupported kind, its rows cannot be read, or no task reads some given
            rows.
    """
    tasks: list[TaskRows | GameRows] = []
    for name in evaluation.tasks:
        data, key = evaluation.data.get(name), f"{prefix}data.{name}"
        if isinstance(data, GameSeeds):
            examples = [as_game(example) for example in data.examples(key)[: evaluation.limit]]
            tasks.append(GameRows(name, str(data), examples))
        else:
            tasks += _load(name, data, key, evaluation, prefix)
    for name in evaluation.data.keys() - set(evaluation.tasks):
        raise UserError(f"{prefix}data.{name} has no effect: tasks are {', '.join(evaluation.tasks)}; remove it")
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{prefix}tasks: {twice[0]} is asked twice: by its name and as a part of a group; remove one")
    return tasks


def _load(name: str, data: str | None, key: str, evaluation: Evaluation, prefix: str) -> list[TaskRows]:
    metadata = {"key": key} | ({} if data is None else {"source": data})
    manager = manager_for(name, evaluation.include_path, prefix, metadata)
    about = manager.task_index[name].cfg or {}
    if data is not None and "custom_dataset" not in about:
        raise UserError(
            f"{key} has no effect: {name} reads {about.get('dataset_path', 'its own data set')}; remove it, or "
            f"write a task that includes {name} and reads your rows (docs/evaluation.md)"
        )
    with _explained(name, about, prefix):
        loaded = manager.load([name])["tasks"]
    return [_rows(task, evaluation, prefix) for task in loaded.values()]


@contextmanager
def _explained(name: str, about: dict[str, Any], prefix: str) -> Iterator[None]:
    """Turn an error while lm-eval loads a task into a message: no data set, or a wrong file or wrong code."""
    import datasets
    from datasets.exceptions import DatasetsError

    own = "custom_dataset" in about
    if not own and not hub_reachable():
        datasets.config.HF_HUB_OFFLINE = True  # read the cache, without 20 s of attempts to connect
    datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ImportError):
            raise UserError(f"{prefix}tasks: {name} needs {error.name or 'a package'}: {why}") from error
        no_data = isinstance(error, ConnectionError | FileNotFoundError | DatasetsError)
        no_data = no_data or "cache" in str(error) or "BuilderConfig" in str(error)
        if own or about.get("dataset_path") in LOCAL or not no_data:
            raise UserError(f"{prefix}tasks: {name} cannot be loaded: {why}") from error
        data = "/".join(str(about[part]) for part in ("dataset_path", "dataset_name") if about.get(part)) or "its own"
        raise UserError(
            f"{prefix}tasks: {name} reads the data set {data}, which is not here ({why}). Run this once where the hub "
            f"can be reached and copy its cache ({datasets.config.HF_DATASETS_CACHE}), or write a task that includes "
            f"{name} and reads your file (docs/evaluation.md)"
        ) from error


def _rows(task: Any, evaluation: Evaluation, prefix: str) -> TaskRows:
    name, config = task.task_name, task.config
    _refuse_unsupported(name, task, prefix)
    metadata = config.metadata or {}
    filters = [one["name"] for one in config.filter_list or [{"name": "none"}]]
    metrics = list(task.aggregation())
    split = config.test_split or config.validation_split
    source = "/".join(str(part) for part in (config.dataset_path, config.dataset_name) if part)
    chat = (evaluation.apply_chat_template, metadata.get("chat_template"), task.OUTPUT_TYPE == "generate_until")
    return TaskRows(
        name=name,
        task=task,
        file=shown_file(metadata["config_source"]),
        source=metadata.get("source") or (f"{source}:{split}" if source else "custom_dataset"),
        count=min(len(task.eval_docs), evaluation.limit or len(task.eval_docs)),
        filters=filters,
        metrics=metrics if len(filters) == 1 else [f"{metric},{one}" for one in filters for metric in metrics],
        generation=_generation(name, task, prefix),
        thinking=metadata.get("thinking"),
        chat=next(answer for answer in chat if answer is not None),
    )


def _refuse_unsupported(name: str, task: Any, prefix: str) -> None:
    from lm_eval.api.task import ConfigurableTask

    reasons = {
        "it is a class in Python, and not a YAML file": not isinstance(task, ConfigurableTask),
        "it runs code that the model writes": getattr(task, "UNSAFE_CODE", False),
        "it shows pictures or sound": getattr(task, "MULTIMODAL", False),
        "it asks each question several times (repeats)": getattr(task.config, "repeats", 1) != 1,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{prefix}tasks: {name} cannot be asked here: {reason}; lm-eval's own command does it")
    if task.config.process_results is None:
        from lm_eval.api.registry import metric_registry

        for metric, function in task._metric_fn_list.items():
            if function is None:  # lm-eval fails only when it scores
                raise UserError(f"{prefix}tasks: {name}: no metric {metric!r}{did_you_mean(metric, metric_registry)}")


def _generation(name: str, task: Any, prefix: str) -> dict[str, Any]:
    """The `generation_kwargs` of a task under one name each, with lm-eval's defaults."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if task.OUTPUT_TYPE != "generate_until":
        return {}
    settings: dict[str, Any] = dict(normalize_gen_kwargs(task.config.generation_kwargs))
    if settings.get("num_beams") == 1:
        settings.pop("num_beams")
    if unknown := settings.keys() - {*KNOWN, *OPTIONS}:
        raise UserError(
            f"{prefix}tasks: {name}: generation_kwargs: {sorted(unknown)[0]} is no setting of opcd's decoding"
        )
    return settings
