"""The settings of an evaluation: tasks, rows, and how answers are drawn."""

from dataclasses import dataclass, field
from typing import Any, Literal

from opcd.data.views import split_template
from opcd.games import GameSeeds
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import Mode


@dataclass
class Evaluation:
    """Tasks, their rows, and how the model answers. null takes the paper's setting of the task."""

    tasks: list[str] | str
    """Names of tasks, as a list or separated by commas. Names of this package: contains, exact and choice (for your own
    rows), dapo_math, ifeval, medmcqa, safety. Others: any of lm-eval's (gsm8k, arc_easy; a group gives all of its
    tasks), those of `include_path`, and games of `data`."""
    data: dict[str, str | GameSeeds] = field(default_factory=dict)
    """Rows of a task (data.TASK), for tasks of this package and your own with a `custom_dataset`: a .jsonl, .json, .csv
    or .parquet file, or a hub data set (org/name:split or org/name/config:split). A task whose rows are
    opcd.games.GameSeeds is a game, under any name."""
    include_path: str | None = None
    """A folder with your own tasks: YAML files of lm-eval. They can run Python code (`!function`), so use only a folder
    that you trust. If two tasks have the same name, this folder's is used."""
    apply_chat_template: bool | None = None
    """Whether to apply the model's chat template, with few-shot examples as turns. null: as the task says, else true if
    text is generated (as in training), and false if log-likelihoods are compared (lm-eval's default)."""
    limit: int | None = None
    """Use only the first rows of each task, this many; null: all."""
    samples: int = 1
    """Answers per question; more than one adds avg@K and pass@k."""
    seed: int = 0
    """Seed of the sampled answers, which depend only on this seed and the batches."""
    context: str | None = None
    """A file with a context for every prompt (the in-context baseline); null: no context."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes: `system` (joined to an existing system message), or `user` (before the query)."""
    template: str | None = None
    """Joins context and query for placement user; contains {context} and {query} once each."""
    greedy: bool = False
    """Greedy decoding: take the most likely token each time."""
    temperature: float | None = None
    """Sampling temperature: the logits are divided by it."""
    top_p: float | None = None
    """Nucleus sampling: sample from the smallest set of tokens with this share of the probability mass."""
    top_k: int | None = None
    """Sample among this many most likely tokens; 0: all tokens."""
    max_new_tokens: int | None = None
    """Token limit of an answer, or of a reply in a game. null: the task's limit, or the rest of the model's window if
    that is smaller."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extra variables of the chat template; null: those of the model's config."""
    batch_size: int | Literal["auto"] = 8
    """Questions, or games, per batch; `auto`: as many as fit into the free memory."""
    shared_prefix: Mode = "auto"
    """Prefix caching of the context for generated answers, as in training."""

    def __post_init__(self) -> None:
        names = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        self.tasks = [name.strip() for name in names if name.strip()]
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must be one or more names, each once, got {self.tasks}")
        for name in ("limit", "samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        drawing = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if self.greedy and drawing:
            raise ValueError(f"{drawing[0]} has no effect with greedy; remove one of the two")
        if self.greedy and self.samples > 1:
            raise ValueError("samples: greedy answers are all the same; leave samples at 1, or remove greedy")
        if self.temperature == 0:
            raise ValueError("temperature 0 is called greedy here: set greedy")
        Sampling(**{name: getattr(self, name) for name in drawing})  # checks the values
        if self.context is not None:
            split_template(self.template, self.placement, "")
        elif self.template is not None or self.placement != "system":
            name = "placement" if self.template is None else "template"
            raise ValueError(f"{name} has no effect without context; remove it, or set context")
