"""The config of an experience run: problems, models, lists, selection, and rounds of distillation."""

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
    """A model that attempts problems, or writes lessons."""

    model: ModelConfig | None = None
    """The model; null: `model`."""
    sampling: Sampling = field(default_factory=lambda: Sampling(max_new_tokens=1024, temperature=0.6, top_p=0.95))
    """How tokens are drawn; max_new_tokens is the limit of an answer, or of a turn of a game."""
    batch_size: int = 8
    """Conversations in a batch."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")


@dataclass
class Extract(Stage):
    """The model that reads an attempt and writes general lessons."""

    prompt: str | None = None
    """A Jinja file that replaces the prompt opcd/experience/prompts/extract.txt."""
    marker: str = "LESSON:"
    """The beginning of the lines of the answer that are lessons."""
    show_earlier: bool = False
    """Show the lessons of the list so far; the extraction then runs step by step, not for all attempts at once."""
    show_outcome: bool = False
    """Show whether the attempt was right. The reference answer is never shown."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.marker.strip():
            raise ValueError("extract.marker is empty; lessons are found by it")


@dataclass
class Lessons:
    """The rules by which lessons are added to a list."""

    max_tokens: int = 4096
    """Most tokens of a list's text, by the student's tokenizer; above it the oldest lessons are dropped."""
    near: float | None = 0.9
    """Join a lesson with an earlier one of at least this similarity (0 to 1, difflib); null: of equal words only."""
    prompt: str | None = None
    """A Jinja file that makes a list's text from `lessons`; replaces opcd/experience/prompts/context.txt."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"lessons.max_tokens must be at least 1, got {self.max_tokens}")
        if self.near is not None and not 0 < self.near < 1:
            raise ValueError(f"lessons.near must be between 0 and 1, or null, got {self.near}")


@dataclass
class Select(Stage):
    """The model that scores the lists: its success on the validation items, with a list in its prompt."""

    every: int = 1
    """Score each list after every so many steps, and after the last one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise ValueError(f"select.every must be at least 1, got {self.every}")


@dataclass
class Fit(Base):
    """The `opcd fit` of a round: files and keys as in a sweep's `base`. The round sets student and context."""

    teacher: Literal["fixed", "renewed"] = "fixed"
    """fixed: the same teacher in all rounds; renewed: the student that the round starts with."""
    context: Literal["selected", "each"] = "selected"
    """selected: the best list; each: the best version of every list, one drawn for each example."""


@dataclass
class Experience:
    """An experience run."""

    problems: Problems
    """The problems: opcd.experience.MathProblems, or another subclass of Problems."""
    student: ModelConfig = field(default_factory=ModelConfig)
    """The model that the lessons are for. Its tokenizer counts their tokens; rounds train it."""
    model: ModelConfig | None = None
    """The model of the stages that name none; null: the student."""
    solve: Stage = field(default_factory=Stage)
    """Attempt training items, without lessons."""
    extract: Extract = field(default_factory=Extract)
    """Extract lessons from attempts."""
    lessons: Lessons = field(default_factory=Lessons)
    """Add lessons to lists."""
    select: Select = field(default_factory=Select)
    """Select a list by validation items."""
    lists: int = 10
    """The number of lists, each with its own order of the training items."""
    steps: int = 30
    """The number of training items of each list, one a step."""
    placement: Literal["system", "user"] = "system"
    """The place of a list in a prompt; as data.placement of the distillation."""
    template: str | None = None
    """The text of list and query with placement user; holds {context} and {query} once each."""
    seed: int = 0
    """Seed of the orders and of all draws."""
    rounds: int = 0
    """Rounds of experience and distillation, each with the student of the previous round; 0: make lists only."""
    fit: Fit | None = None
    """The distillation of the lists; required with rounds."""

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
        """The model and config key of a stage; the stage `student` is the student with the settings of `select`."""
        if stage == "student":
            return self.student, "student"
        own = self.stage(stage).model
        if own is not None:
            return own, f"{stage}.model"
        return (self.student, "student") if self.model is None else (self.model, "model")

    def stage(self, name: StageName) -> Stage:
        """The settings of a stage."""
        stage: Stage = getattr(self, "select" if name == "student" else name)
        return stage

    def with_student(self, folder: str) -> "Experience":
        """The same run with another student."""
        return replace(self, student=replace(self.student, name=folder, revision=None))


def made(config: Any) -> Experience:
    """Make the run from the values that a parser instantiated; ValueError where they do not fit together."""
    return Experience(**{each.name: config[each.name] for each in fields(Experience)})
