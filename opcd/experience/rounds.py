"""Online experiential learning (arXiv:2603.16856): rounds of experience and distillation.

In a round, the student solves, lessons are extracted and selected, and `opcd fit` distils them into the student. The
next round starts with that student. Each distillation is a process of its own, run by the engine of `opcd sweep`.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opcd.experience.experience_config import Experience
from opcd.experience.experience_folder import CONTEXT, CONTEXTS
from opcd.experience.loop import Loop
from opcd.experience.rounds_table import TABLE, Round
from opcd.results.run_files import figures
from opcd.runtime.errors import UserError
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.job_engine import Engine, Task
from opcd.sweep.jobs import fit_job
from opcd.writing.claimed_folder import write_records

TEACHER = "model.teacher.init_args.model"
OWN = {"model.student.name": "student.name", "data.context": "the selected lists"}


class Rounds:
    """All rounds of a run.

    Args:
        config: the run.
        out: its folder; a folder `round-N` for each round.
        checker: checks the configs of the distillations.
        engine: runs the distillations.
        make_loop: makes the loop of a round, from its config, folder and number.
    """

    def __init__(
        self,
        config: Experience,
        out: Path,
        checker: ConfigChecker,
        engine: Engine,
        make_loop: Callable[[Experience, Path, int], Loop],
    ) -> None:
        self.config, self.out, self.checker, self.engine, self._make_loop = config, out, checker, engine, make_loop

    def run(self) -> list[Task]:
        """Run what is not done yet; return the distillations that failed."""
        config, rows = self.config, []
        loop = self._loop(config, 1)
        before = loop.score_without("student")
        for number in range(1, self.config.rounds + 1):
            selected = loop.run()
            without = loop.score_without("select")
            loop.writers.close()
            task = self._distil(number, config)
            if self.engine.failed():
                return self.engine.failed()
            config = self.config.with_student(str(task.folder.run / "student"))
            loop = self._loop(config, number + 1)
            after = loop.score_without("student")
            row = Round(
                round=number,
                student_before=before.success,
                without=without.success,
                selected=selected.success,
                lessons=selected.lessons,
                tokens=selected.tokens,
                divergence=figures(task.folder.run).get("train/divergence"),
                student_after=after.success,
                items=after.items,
            )
            rows.append(row)
            write_records(self.out / TABLE, [asdict(row) for row in rows])
            before = after
        return []

    def _loop(self, config: Experience, number: int) -> Loop:
        return self._make_loop(config, self.out / f"round-{number}", number)

    def _distil(self, number: int, config: Experience) -> Task:
        assert self.config.fit is not None
        name = CONTEXT if self.config.fit.context == "selected" else CONTEXTS
        settings = fit_settings(self.config, config, self.out / f"round-{number}" / name, self.checker)
        words = self.checker.words(settings)
        job = fit_job(f"round-{number}/fit", self.out, words, self.checker.resolve(settings, f"fit of round {number}"))
        (task,) = self.engine.add([job])
        self.engine.run()
        return task


def fit_settings(first: Experience, now: Experience, context: Path, checker: ConfigChecker) -> dict[str, Any]:
    """Make the settings of a round over the config of `fit`: student, context, and the teacher where it must be named.

    Args:
        first: the run with its first student.
        now: the run with the student of the round.
        context: the file with the lists.
        checker: resolves the config of `fit`.

    Raises:
        UserError: the teacher of that config cannot be what fit.teacher asks for.
    """
    assert first.fit is not None
    settings: dict[str, Any] = {"model.student.name": now.student.name, "data.context": str(context)}
    teacher = checker.resolve(settings, "fit")["model"]["teacher"]
    if teacher["class_path"].endswith(".RoutedTeachers"):
        raise UserError("model.teacher of fit: a round has one context and one teacher; RoutedTeachers has several")
    frozen = teacher["class_path"].endswith(".FrozenTeacher")
    named = frozen and teacher["init_args"]["model"] is not None
    if first.fit.teacher == "renewed":
        if named:
            raise UserError(
                f"fit.teacher: renewed takes each round's student as its teacher, but fit.set or fit.config names one "
                f"({TEACHER}: {teacher['init_args']['model']['name']}); remove that, or set fit.teacher: fixed"
            )
        return settings  # a teacher without a model of its own starts as the student
    if not frozen and first.rounds > 1:
        raise UserError(
            f"fit.teacher: fixed needs a FrozenTeacher; {teacher['class_path']} follows the student: set renewed"
        )
    if frozen and not named:
        settings[f"{TEACHER}.name"] = first.student.name
        settings[f"{TEACHER}.chat_template_kwargs"] = first.student.chat_template_kwargs
    return settings


def check_rounds(config: Experience, checker: ConfigChecker) -> None:
    """Check the config of the distillations, before anything is computed.

    Raises:
        UserError: names the key.
    """
    assert config.fit is not None
    for key, instead in OWN.items():
        if key in config.fit.set:
            raise UserError(f"fit.set: {key} is set by each round, from {instead}; remove it")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lessons.txt"
        file.write_text("A lesson.", encoding="utf-8")
        settings = fit_settings(config, config, file, checker)
        data = checker.resolve(settings, "fit")["data"]
    for key in ("placement", "template"):
        if data[key] != getattr(config, key):
            raise UserError(
                f"{key}: lists are selected with {getattr(config, key)!r}, but data.{key} of fit is {data[key]!r}; "
                "make them agree"
            )
