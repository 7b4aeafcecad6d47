"""The tasks of `opcd/tasks` with their rows, as lm-eval's task objects."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.game_tasks import GameRows
from opcd.games import GameSeeds
from opcd.runtime.did_you_mean import did_you_mean
from opcd.runtime.errors import UserError

FOLDER = Path(__file__).parent.parent / "tasks"


@dataclass(frozen=True)
class TaskRows:
    """A task of lm-eval that has read its rows.

    Attributes:
        name: its name.
        task: lm-eval's ConfigurableTask.
        source: where the rows come from.
        questions: the messages of the questions that are asked, each with where it was read.
        metrics: names of its metrics, the main one first.
        generation: how its YAML draws answers, in lm-eval's words.
        thinking: false where the task is asked without thinking, by models that can switch it.
    """

    name: str
    task: Any
    source: str
    questions: list[tuple[str, list[dict[str, str]]]]
    metrics: list[str]
    generation: dict[str, Any]
    thinking: bool | None

    def __len__(self) -> int:
        return len(self.questions)

    def longest_prompt(self, length: Callable[[list[dict[str, str]], str], int]) -> int:
        """Tokens of the longest prompt."""
        return max(length(messages, where) for where, messages in self.questions)


def load_tasks(evaluation: Evaluation, prefix: str = "") -> list[TaskRows | GameRows]:
    """The tasks of an evaluation. `prefix` stands before its keys in messages.

    Raises:
        UserError: a task is unknown, its rows cannot be read, or rows are given that no task reads.
    """
    if asked := [name for name in evaluation.tasks if not isinstance(evaluation.data.get(name), GameSeeds)]:
        _refuse_unknown(asked, prefix)
    for name in evaluation.data.keys() - set(evaluation.tasks):
        raise UserError(f"{prefix}data.{name} has no effect: tasks are {', '.join(evaluation.tasks)}; remove it")
    return [_rows(name, evaluation, prefix) for name in evaluation.tasks]


def _refuse_unknown(names: list[str], prefix: str) -> None:
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_defaults=False, include_path=FOLDER).all_tasks
    for name in names:
        if name not in known:
            raise UserError(
                f"{prefix}tasks: no task {name!r}{did_you_mean(name, known)}; there are {', '.join(known)}, "
                f"and games, whose {prefix}data.{name} is opcd.games.GameSeeds"
            )


def _rows(name: str, evaluation: Evaluation, prefix: str) -> TaskRows | GameRows:
    data = evaluation.data.get(name)
    if isinstance(data, GameSeeds):
        return GameRows.of(name, data, evaluation.limit, f"{prefix}data.{name}")
    return _load(name, evaluation, prefix)


def _load(name: str, evaluation: Evaluation, prefix: str) -> TaskRows:
    from lm_eval.tasks import TaskManager

    local = {"source": evaluation.data[name]} if name in evaluation.data else {}
    manager = TaskManager(
        include_defaults=False, include_path=FOLDER, metadata={"key": f"{prefix}data.{name}", **local}
    )
    task = manager.load([name])["tasks"][name]
    docs = task.eval_docs.select(range(min(len(task.eval_docs), evaluation.limit or len(task.eval_docs))))
    return TaskRows(
        name=name,
        task=task,
        source=task.config.metadata["source"],
        questions=[(doc["source"], _messages(task, doc)) for doc in docs],
        metrics=[metric["metric"] for metric in task.config.metric_list],
        generation=task.config.generation_kwargs,
        thinking=task.config.metadata.get("thinking"),
    )


def _messages(task: Any, doc: dict[str, Any]) -> list[dict[str, str]]:
    """As lm-eval builds them, for the check of their lengths."""
    system = doc.get("system")
    before = [{"role": "system", "content": system}] if system else []
    return [*before, {"role": "user", "content": task.doc_to_text(doc)}]
