"""What is evaluated, and how the answers are drawn."""

from dataclasses import dataclass, field
from typing import Any, Literal

from opcd.data.views import split_template
from opcd.games import GameSeeds
from opcd.modules.lm.generation import Sampling
from opcd.modules.prefix.prefix_cache import Mode


@dataclass
class Evaluation:
    """Tasks, their rows, and how the model answers. What is null is what the paper does, by task."""

    tasks: list[str] | str
    """Names of tasks, a list, or text with commas: this package's (contains, exact and choice for rows of your own;
    dapo_math, ifeval, medmcqa, safety), any of lm-eval's (gsm8k, arc_easy; a group gives all of its tasks), those of
    `include_path`, or a game's of `data`."""
    data: dict[str, str | GameSeeds] = field(default_factory=dict)
    """Rows of a task (data.TASK), of this package's or of one of yours that has a `custom_dataset`: a .jsonl, .json,
    .csv or .parquet file, or a hub data set (org/name:split or org/name/config:split). A task whose rows are
    opcd.games.GameSeeds is a game, and has any name."""
    include_path: str | None = None
    """A folder with tasks of your own: YAML files of lm-eval. They can run Python code (`!function`): name only a
    folder that you trust. Of a name that is known twice, the folder's is taken."""
    apply_chat_template: bool | None = None
    """Ask through the model's chat template, examples before the question as turns. null: as the task says, else yes
    where text is generated, as in training, and no where log-likelihoods are compared, as is lm-eval's default."""
    limit: int | None = None
    """Take the first so many rows of each task; null takes all."""
    samples: int = 1
    """Answers to each question; more than one adds avg@K and pass@k."""
    seed: int = 0
    """Seed of the draws; they depend on nothing else but the batches."""
    context: str | None = None
    """A file with a context that stands in every prompt (the in-context baseline); null asks without."""
    placement: Literal["system", "user"] = "system"
    """Where the context goes: system (joined to a system message that is there), or user (before the query)."""
    template: str | None = None
    """Joins context and query for placement user; holds {context} and {query} once each."""
    greedy: bool = False
    """Take the likeliest token each time."""
    temperature: float | None = None
    """Divides the logits before sampling."""
    top_p: float | None = None
    """Sample from the smallest set of tokens that holds this share of the mass."""
    top_k: int | None = None
    """Sample among this many likeliest tokens; 0 keeps all."""
    max_new_tokens: int | None = None
    """Most tokens of an answer, or of a reply in a game. null: as the task says, or what the model's window leaves
    where that is less."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Extra variables of the chat template; null takes those of the model's config."""
    batch_size: int | Literal["auto"] = 8
    """Questions, or games, that are answered at once; auto takes as many as the free memory holds."""
    shared_prefix: Mode = "auto"
    """Whether the keys and values of the context are computed once for all questions that are answered with generated
    text, as in training."""

    def __post_init__(self) -> None:
        names = self.tasks.split(",") if isinstance(self.tasks, str) else self.tasks
        self.tasks = [name.strip() for name in names if name.strip()]
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks wants one or more names, each once, got {self.tasks}")
        for name in ("limit", "samples", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        self._check_drawing()
        self._check_context()

    def _check_drawing(self) -> None:
        drawing = [name for name in ("temperature", "top_p", "top_k") if getattr(self, name) is not None]
        if self.greedy and drawing:
            raise ValueError(f"{drawing[0]} has no effect with greedy; remove one of the two")
        if self.greedy and self.samples > 1:
            raise ValueError("samples: greedy answers are all the same; leave samples at 1, or draw them")
        if self.temperature == 0:
            raise ValueError("temperature 0 is called greedy here: set greedy")
        Sampling(**{name: getattr(self, name) for name in drawing})  # refuses what cannot be drawn with

    def _check_context(self) -> None:
        if self.context is not None:
            split_template(self.template, self.placement, "")
        elif self.template is not None or self.placement != "system":
            name = "placement" if self.template is None else "template"
            raise ValueError(f"{name} has no effect without context; remove it, or set context")
