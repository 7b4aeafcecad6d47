"""How a student was trained: facts beside its weights as JSON, and a model card that shows them."""

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args, get_type_hints

from opcd.runtime.output import markdown, markdown_code
from opcd.runtime.versions import VERSION

FACTS = "distillation.json"
"""The file beside the weights."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+((/[\w.-]+)?:\S+)?")
"""org/name; for a data set also org/name:split or org/name/config:split."""

CARD = """---
library_name: {library}
{base}tags: [context-distillation, opcd]
---
# {name} with a context in its weights

Trained with [opcd](https://arxiv.org/abs/2602.12275): the student answers without the context, the teacher scores the
answer with it.

| | |
|---|---|
{rows}
"""
TITLES = {
    "recovery": "share of the context's effect in the weights",
    "drift": "drift on general prompts, nats a token",
    "scale": "share of the change that was kept",
    "context_sha256": "context (sha256)",
    "former_contexts": "contexts of former trainings (sha256)",
    "learning_rate": "learning rate",
    "lr_scheduler": "schedule of the learning rate",
    "batch_size": "batch size",
}


@dataclass(frozen=True)
class Facts:
    """How a student was trained, as plain values; None: not known. The context is named by its hash, never shown.

    Attributes:
        base: the model that the training began with.
        teacher: each teacher's class -> its model, None where it has none of its own.
        context: the file of the context; rows may have had contexts of their own.
        context_sha256: the hash of all contexts that the teacher saw.
        learning_rate: the optimizer's, before a scheduler changes it.
        batch_size: rows of a step, on all ranks.
        precision: the trainer's.
        recovery: the share of the context's effect that is in the weights, in words with its interval.
        drift: how far answers to general prompts have moved, in words with its interval.
        scale: the share of the training's change of the weights that was kept (`opcd blend`); None: all of it.
        former_contexts: `context_sha256` of each earlier training of the base, the oldest first.
        opcd: the version that trained the student.
    """

    base: str
    teacher: dict[str, str | None] | None = None
    context: str | None = None
    context_sha256: str | None = None
    data: str | None = None
    loss: str | None = None
    temperature: float | None = None
    reduction: str | None = None
    rollout: str | None = None
    optimizer: str | None = None
    learning_rate: float | None = None
    lr_scheduler: str | None = None
    batch_size: int | None = None
    precision: str | None = None
    steps: int | None = None
    recovery: str | None = None
    drift: str | None = None
    scale: float | None = None
    former_contexts: str | None = None
    opcd: str | None = VERSION

    def write(self, folder: Path) -> None:
        """Write the facts beside a student's weights."""
        (folder / FACTS).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Facts | None":
        """Read the facts of a student's folder; None where there are none that can be read."""
        try:
            return cls.of(json.loads((folder / FACTS).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    @classmethod
    def of(cls, values: dict[str, object]) -> "Facts":
        """Make facts from plain values; TypeError for unknown names and for other types."""
        facts = cls(**values)  # type: ignore[arg-type]
        teacher = {} if facts.teacher is None else facts.teacher
        if not isinstance(teacher, dict) or not all(isinstance(text, str | None) for text in teacher.values()):
            raise TypeError("teacher")
        for name, kind in get_type_hints(cls).items():
            value = getattr(facts, name)
            whole = type(value) is int and float in get_args(kind)  # JSON may write 1.0 as 1
            if name != "teacher" and not isinstance(value, kind) and not whole:
                raise TypeError(name)
        return facts

    @classmethod
    def contexts_in(cls, folder: Path) -> str | None:
        """Read `context_sha256` of each training of a folder's student, the oldest first; None: there are none."""
        facts = cls.read(folder)
        known = [facts.former_contexts, facts.context_sha256] if facts else []
        return ", ".join(one for one in known if one) or None

    def published(self) -> "Facts":
        """The same facts for publication: hub ids and file names, without paths of this machine."""
        teacher = {label: model and _name(model) for label, model in (self.teacher or {}).items()}
        several = (
            self.data is not None and "/" in self.data and " " in self.data
        )  # several data sets, each with its path
        return replace(
            self,
            base=_name(self.base),
            teacher=teacher or None,
            context=self.context and _name(self.context),
            data=None if several else self.data and _name(self.data),
        )


def model_card(facts: Facts, adapter: bool = False, command: str | None = None) -> str:
    """Write the README.md of a student's folder; unknown facts have no row."""
    known = {name: None if value is None else markdown(value) for name, value in vars(facts).items()}
    known["command"] = command and markdown_code(command)
    if facts.teacher is not None:
        taught = [f"{label} of {model}" if model else label for label, model in facts.teacher.items()]
        known["teacher"] = markdown("; ".join(taught))
    rows = [f"| {TITLES.get(name, name)} | {value} |" for name, value in known.items() if value is not None]
    base = f"base_model: {facts.base}\n" if is_hub_id(facts.base) else ""  # the hub accepts nothing else there
    library = "peft" if adapter else "transformers"
    return CARD.format(library=library, base=base, name=markdown(_name(facts.base)), rows="\n".join(rows))


def is_hub_id(name: str) -> bool:
    """Whether a name is org/name, and not a local path."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _name(value: str) -> str:
    return value if is_hub_id(value) else Path(value).name
