"""The arms of the comparison, and the jobs that run them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from opcd.cli.evaluate import make_parser, parse
from opcd.data import ExampleSource
from opcd.evaluation.evaluation_run import Evaluator
from opcd.games import GameSeeds
from opcd.runtime.did_you_mean import or_all
from opcd.runtime.errors import UserError
from opcd.runtime.files.user_files import require_file
from opcd.sweep.arm_checks import ConfigChecker
from opcd.sweep.jobs import Job, fit_job
from opcd.sweep.sweep_plan import Base, file_name, overrides

SAMPLES = "samples"  # a task without a process of its own: the sample answers that every fit writes

TOP_K = {"inner": {"class_path": "opcd.losses.ReverseKL"}, "k": 256, "support": "student"}
BASE, IN_CONTEXT, TEACHER = "base", "in-context", "teacher with context"
UNTRAINED = (BASE, IN_CONTEXT, TEACHER)

# Who writes the responses, and the divergence: off-policy is the teacher with the context, OPCD the student without.
TRAINED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "off-policy, forward KL": ("TeacherRollout", "ForwardKL", {}),
    "off-policy, reverse KL": ("TeacherRollout", "ReverseKL", {}),
    "OPCD, reverse KL": ("StudentRollout", "ReverseKL", {}),
    "OPCD, forward KL": ("StudentRollout", "ForwardKL", {}),
    "OPCD, JSD": ("StudentRollout", "JSD", {}),
    "OPCD, top-256 drop": ("StudentRollout", "TopK", {**TOP_K, "tail": "drop"}),
    "OPCD, top-256 bucket": ("StudentRollout", "TopK", {**TOP_K, "tail": "bucket"}),
}


@dataclass
class Measure:
    """What is measured of every arm."""

    name: str
    """A task of `opcd evaluate` (any of lm-eval's too, or with options.include_path one of a folder of yours), or
    samples: the answers to data.val that every fit writes, right where they contain the reference."""
    metric: str
    """The metric that the table shows, such as accuracy or prompt_level_strict_acc; each answer must have a score."""
    title: str
    """What the table calls it."""
    data: str | None = None
    """File or hub data set with the rows; null takes the task's own."""
    games: dict[str, Any] = field(default_factory=dict)
    """In place of data, for a game: opcd.games.GameSeeds, as class_path and init_args."""
    options: dict[str, Any] = field(default_factory=dict)
    """More options of `opcd evaluate`: limit, greedy, samples, max_new_tokens, include_path, ..."""


@dataclass
class Benchmark:
    """One comparison."""

    task: Measure
    """What the context should teach."""
    forgetting: Measure
    """What must not be lost."""
    base: Base = field(default_factory=Base)
    """The config of all fits."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """How rollouts draw: max_new_tokens, temperature, top_p, top_k."""
    around: str | None = None
    """class_path of a rollout that takes each arm's rollout as its `rollout`: opcd.games.GameRollout, for games."""
    arms: list[str] = field(default_factory=lambda: [*UNTRAINED, *TRAINED])
    """Which arms, in the order of the table."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """A fit for each, with its own evaluations. Untrained arms are measured once, with the first."""
    slurm: list[str] = field(default_factory=list)
    """Options of srun, for --launcher slurm."""

    @property
    def measures(self) -> dict[str, Measure]:
        """By the key in the file, which is the key of their results too: both may be one task with other rows."""
        return {"task": self.task, "forgetting": self.forgetting}

    def apply(
        self, student: str | None, teacher: str | None, task: str | None, forgetting: str | None, dotted: dict[str, Any]
    ) -> None:
        """Put what the command line says over the file, and check what needs no parser."""
        named = {"model.student.name": student, "model.teacher.init_args.model.name": teacher}
        self.base.set |= {key: name for key, name in named.items() if name is not None} | dotted
        self.task.data = task or self.task.data
        self.forgetting.data = forgetting or self.forgetting.data
        for name in self.arms:
            if name not in (*UNTRAINED, *TRAINED):
                raise UserError(f"arms: no arm {name!r}; there are: {'; '.join((*UNTRAINED, *TRAINED))}")
        for key, values in (("arms", self.arms), ("seeds", self.seeds)):
            if not values or len({*map(str, values)}) < len(values):
                raise UserError(f"{key} must be one or more, each once, not {values}")
        if self.task.name == SAMPLES and not any(name in TRAINED for name in self.arms):
            raise UserError("task.name: samples are written by a fit, and no arm is trained; add one")
        for key, measure in self.measures.items():
            if measure.games and measure.data:
                raise UserError(f"{key}.data has no effect beside {key}.games; remove one of the two")
        if self.forgetting.name == SAMPLES:
            raise UserError("forgetting.name: must be a task of `opcd evaluate`")


class Plan:
    """Jobs by arm and seed; making it checks every config.

    Args:
        benchmark: what to compare.
        checker: of the base config.
        root: the folder of all results.

    Raises:
        UserError: a config, a file or a task is wrong.
    """

    def __init__(self, benchmark: Benchmark, checker: ConfigChecker, root: Path) -> None:
        self.benchmark, self.checker, self.root = benchmark, checker, root
        self.fits = {
            name: [self._fit(name, seed) for seed in benchmark.seeds] for name in benchmark.arms if name in TRAINED
        }
        self.config = checker.resolve({}, "base")
        self.context = self.config["data"]["context"]
        if self.context is None:
            raise UserError("data.context: the in-context arm needs one file with the context; set --data.context FILE")
        self.measured = {key: measure for key, measure in benchmark.measures.items() if measure.name != SAMPLES}
        self.student, self.teacher = self._models()
        self.evaluations = {name: self._evaluations(name) for name in benchmark.arms}
        self._check_evaluations()

    def jobs(self) -> list[Job]:
        """All jobs: of each arm and seed first the fit, then what is measured of it."""
        fits = [fit for seeds in zip(*self.fits.values(), strict=True) for fit in seeds]
        measures = [job for jobs in self.evaluations.values() for by_seed in jobs for job in by_seed.values()]
        of = {fit.name: [job for job in measures if fit.name in job.after] for fit in fits}
        return [*(job for job in measures if not job.after), *(job for fit in fits for job in (fit, *of[fit.name]))]

    def _fit(self, name: str, seed: int) -> Job:
        rollout, loss, init_args = TRAINED[name]
        who: dict[str, Any] = {
            "class_path": f"opcd.modules.{rollout}",
            "init_args": {"sampling": self.benchmark.sampling},
        }
        around = self.benchmark.around
        settings = {
            "model.rollout": {"class_path": around, "init_args": {"rollout": who}} if around else who,
            "model.loss": {"class_path": f"opcd.losses.{loss}", "init_args": init_args},
            "seed_everything": seed,
            "data.seed": seed,
        }
        config = self.checker.resolve(settings, name)
        return fit_job(f"{file_name(name)}/seed={seed}/fit", self.root, self.checker.words(settings), config)

    def _models(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `opcd evaluate` must know of the student and of the teacher."""
        student = self.config["model"]["student"]
        teacher = (self.config["model"]["teacher"].get("init_args") or {}).get("model") or student
        return self.config["model"]["student"], teacher

    def _evaluations(self, name: str) -> list[dict[str, Job]]:
        """A mapping key of the measure -> job for each seed."""
        measured = [key for key in self.measured if name != TEACHER or key == "task"]
        if name in TRAINED:
            # The exported folder has its tokenizer and template with it.
            own = {key: value for key, value in self.student.items() if key in ("chat_template_kwargs", "attention")}
            students = [own | {"name": str(self.root / fit.name / fit.proof)} for fit in self.fits[name]]
            return [
                {key: self._evaluate(name, key, student, None, seed, fit) for key in measured}
                for student, seed, fit in zip(students, self.benchmark.seeds, self.fits[name], strict=True)
            ]
        model = self.teacher if name == TEACHER else self.student
        context = None if name == BASE else self.context
        return [{key: self._evaluate(name, key, model, context, self.benchmark.seeds[0], None) for key in measured}]

    def _evaluate(
        self, arm: str, key: str, model: dict[str, Any], context: str | None, seed: int, fit: Job | None
    ) -> Job:
        measure = self.measured[key]
        what = {"tasks": measure.name, "seed": seed, **measure.options}
        rows = measure.games or measure.data
        what |= {f"data.{measure.name}": rows} if rows else {}
        what |= {"context": context, "placement": self.config["data"]["placement"]} if context else {}
        what |= {"template": self.config["data"]["template"]} if context and self.config["data"]["template"] else {}
        known = {f"model.{setting}": value for setting, value in model.items() if value is not None and value != {}}
        name = f"{file_name(arm)}/seed={seed}/{key}"
        words = ["evaluate", *overrides(known), *overrides(what), "--out", str(self.root / name)]
        if fit is not None:
            known.pop("model.name")
        config = {"model": known, "evaluation": what, "fit": fit.config if fit else None}
        return Job(name, words, config, "results.json", (fit.name,) if fit else (), (f"{measure.name}.jsonl",))

    def _check_evaluations(self) -> None:
        """Parse what will be asked, and read rows and context once each with a model that is there already."""
        require_file(self.context, "data.context")
        for jobs in self.evaluations.values():
            for job in (job for by_seed in jobs for job in by_seed.values()):
                make_parser().parse_args(job.words[1:])
        seen = set()
        for name in self.benchmark.arms:
            for key, measure in self.measured.items():
                context = self.context if name in (IN_CONTEXT, TEACHER) else None
                model = self.teacher if name == TEACHER else self.student
                if (key, context, str(model)) in seen:
                    continue
                seen.add((key, context, str(model)))
                job = self._evaluate(name, key, model, context, 0, None)
                try:
                    parsed, evaluation, _ = parse(job.words[1:])
                except UserError as error:
                    raise UserError(f"{key}: {error}") from error
                self._refuse_trained(key, evaluation.data.get(measure.name))
                _check_metric(key, measure, Evaluator(evaluation, parsed))

    def _refuse_trained(self, key: str, measured: str | GameSeeds | None) -> None:
        """Games that are measured must not be those that are trained on."""
        train = self.config["data"]["train"]
        if not isinstance(train, dict) or not isinstance(measured, GameSeeds):
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--train", type=ExampleSource)
        shared = parser.instantiate(parser.parse_object({"train": train})).train.overlap(measured)
        if shared is not None:
            raise UserError(f"{key}: its data and data.train share {shared}; give each its own")


def _check_metric(key: str, measure: Measure, evaluator: Evaluator) -> None:
    """Refuse a group of tasks, and a metric that an answer has no score for: the table compares question by question.

    Raises:
        UserError: names the metrics that there are.
    """
    if list(evaluator.answers) != [measure.name]:
        raise UserError(f"{key}.name: {measure.name} is a group of {len(evaluator.answers)} tasks; name one of them")
    known = evaluator.row_metrics(measure.name)
    if measure.metric not in known:
        others = or_all(measure.metric, known)
        raise UserError(f"{key}.metric: the answers to {measure.name} have no score {measure.metric!r}{others}")
