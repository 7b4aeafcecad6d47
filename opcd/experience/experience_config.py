"""What an experience run is told: problems, models, lists, selection, and rounds of distillation."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from opcd.data.views import split_template
from opcd.experience.problems import Problems
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.sweep.sweep_plan import Base

StageName = Literal["solve", "extract", "select", "student"]


@dataclass
class Stage:
    """A model at work: it attempts problems, or writes down lessons."""

    model: ModelConfig | None = None
    """Which model; null takes `model`."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=1024, temperature=0.6, top_p=0.95))
    """How its tokens are drawn; max_new_tokens is the limit of one answer (of one turn of a game)."""
    batch_size: int = 8
    """Conversations that are written at once."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass
class Extract(Stage):
    """The model that reads an attempt and writes down general lessons."""

    prompt: str | None = None
    """A text file (Jinja) that replaces the prompt of the package, opcd/experience/prompts/extract.txt."""
    marker: str = "LESSON:"
    """What a line of the answer begins with to count as a lesson."""
    show_earlier: bool = False
    """Show the lessons of the list so far: the lists then grow step by step, and no longer all at once."""
    show_outcome: bool = False
    """Show how the attempt went. The reference answer is never shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.marker.strip():
            raise ValueError("extract.marker is empty: a lesson could not be told from other lines")


@dataclass
class Lessons:
    """How lessons become a list."""

    max_tokens: int = 4096
    """Most tokens of a list's text, by the student's tokenizer; beyond it the oldest lessons go, each as a whole."""
    near: float | None = 0.9
    """Join a lesson with an earlier one that resembles it this much (0 to 1, difflib); null: the same words only."""
    prompt: str | None = None
    """A text file (Jinja) that makes a list's text of `lessons`; replaces opcd/experience/prompts/context.txt."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"lessons.max_tokens must be at least 1, got {self.max_tokens}")
        if self.near is not None and not 0 < self.near < 1:
            raise ValueError(f"lessons.near must lie between 0 and 1, or be null, got {self.near}")


@dataclass
class Select(Stage):
    """The model whose success on the validation items, with a list in its prompt, chooses the list."""

    every: int = 1
    """Score the list after every so many problems, and the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"select.every must be at least 1, got {self.every}")


@dataclass
class Fit(Base):
    """The `opcd fit` of a round: files and keys as in a sweep's `base`. Student and context are the round's."""

    teacher: Literal["fixed", "renewed"] = "fixed"
    """fixed: the same teacher in all rounds; renewed: that of a round is the student that the round begins with."""
    context: Literal["selected", "each"] = "selected"
    """selected: the one best list; each: the best of every list, of which one is drawn for each example."""


@dataclass
class Experience:
    """An experience run."""

    problems: Problems
    """What is attempted: opcd.experience.MathProblems, or another subclass of Problems."""
    student: ModelConfig = field(default_factory=ModelConfig)
    """The model that the lessons are for: its tokenizer counts their tokens, and rounds improve it."""
    model: ModelConfig | None = None
    """Who solves, extracts and selects, where a stage names no model; null takes the student."""
    solve: Stage = field(default_factory=Stage)
    """Attempts at training items, without lessons."""
    extract: Extract = field(default_factory=Extract)
    """From attempts to lessons."""
    lessons: Lessons = field(default_factory=Lessons)
    """From lessons to lists."""
    select: Select = field(default_factory=Select)
    """The choice among lists, on validation items."""
    lists: int = 10
    """Lists that grow beside each other, each from its own order of the training items."""
    steps: int = 30
    """Training items that each list learns from, one after the other."""
    placement: Literal["system", "user"] = "system"
    """Where a list goes in a prompt; as data.placement of the distillation."""
    template: str | None = None
    """Joins list and query for placement user; holds {context} and {query} once each."""
    seed: int = 0
    """Seed of the orders and of all draws."""
    rounds: int = 0
    """Rounds of experience and distillation, each with the student of the one before; 0 makes lists only."""
    fit: Fit | None = None
    """How the lists are distilled; needed with rounds."""

    def __post_init__(self) -> None:
        for name, least in (("lists", 1), ("steps", 1), ("seed", 0), ("rounds", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        split_template(self.template, self.placement, "")
        if self.rounds and self.fit is None:
            raise ValueError("rounds distil: set fit.config (files as for `opcd fit --config`) or fit.set")
        if self.fit is not None and not self.rounds:
            raise ValueError("fit has no effect without rounds; remove it, or set rounds")
        if self.rounds > 1 and (self.model is not None or self.solve.model is not None):
            key = "solve.model" if self.solve.model is not None else "model"
            raise ValueError(f"rounds: the improved student would never solve while {key} is set; remove it")

    def model_of(self, stage: StageName) -> tuple[ModelConfig, str]:
        """The model of a stage, and the config key that names it. Stage `student`: the student asked as in `select`."""
        if stage == "student":
            return self.student, "student"
        own = self.stage(stage).model
        if own is not None:
            return own, f"{stage}.model"
        return (self.student, "student") if self.model is None else (self.model, "model")

    def stage(self, name: StageName) -> Stage:
        """The settings of a stage."""
        stages: dict[str, Stage] = {"solve": self.solve, "extract": self.extract, "select": self.select}
        return stages.get(name, self.select)

    def with_student(self, folder: str) -> "Experience":
        """The same with an improved student."""
        return replace(self, student=replace(self.student, name=folder, revision=None))


def made(config: Any) -> Experience:
    """The run out of what a parser instantiated. ValueError where values do not fit together."""
    return Experience(**{each.name: config[each.name] for each in fields(Experience)})
