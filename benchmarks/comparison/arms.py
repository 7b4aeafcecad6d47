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

SAMPLES = "samples"  # a task that needs no `opcd evaluate`: the sample answers of every fit

TOP_K = {"inner": {"class_path": "opcd.losses.ReverseKL"}, "k": 256, "support": "student"}
BASE, IN_CONTEXT, TEACHER = "base", "in-context", "teacher with context"
UNTRAINED = (BASE, IN_CONTEXT, TEACHER)

# Rollout and divergence. Off-policy: the teacher with the context generates; OPCD: the student without the context.
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
    """A measure of every arm."""

    name: str
    """A task of `opcd evaluate` (also any of lm-eval's, or one of your folder options.include_path), or `samples`: the
    answers to data.val that every fit writes, which are right if they contain the reference."""
    metric: str
    """The metric in the table, such as accuracy or prompt_level_strict_acc; each answer must have a score."""
    title: str
    """The title in the table."""
    data: str | None = None
    """File or hub data set with the rows; null: the task's own rows."""
    games: dict[str, Any] = field(default_factory=dict)
    """For a game, instead of data: opcd.games.GameSeeds, as class_path and init_args."""
    options: dict[str, Any] = field(default_factory=dict)
    """Other options of `opcd evaluate`: limit, greedy, samples, max_new_tokens, include_path, ..."""


@dataclass
class Benchmark:
    """One comparison."""

    task: Measure
    """The measure of what the context should teach."""
    forgetting: Measure
    """The measure of what must not be forgotten."""
    base: Base = field(default_factory=Base)
    """The config of all fits."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Sampling of the rollouts: max_new_tokens, temperature, top_p, top_k."""
    around: str | None = None
    """class_path of a rollout that takes each arm's rollout as its `rollout`: opcd.games.GameRollout, for games."""
    arms: list[str] = field(default_factory=lambda: [*UNTRAINED, *TRAINED])
    """The arms, in the order of the table."""
    seeds: list[int] = field(default_factory=lambda: [0])
    """One fit per seed, with its own evaluations. Untrained arms are measured once, with the first seed."""
    slurm: list[str] = field(default_factory=list)
    """Options of srun, for --launcher slurm."""

    @property
    def measures(self) -> dict[str, Measure]:
        """The measures by their key in the file and in the results. Both may be the same task with other rows."""
        return {"task": self.task, "forgetting": self.forgetting}

    def apply(
        self, student: str | None, teacher: str | None, task: str | None, forgetting: str | None, dotted: dict[str, Any]
    ) -> None:
        """Apply the options of the command line, and check everything that needs no parser."""
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
    """The jobs by arm and seed. The constructor checks every config.

    Args:
        benchmark: what to compare.
        checker: the checker of the base config.
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
        """All jobs: for each arm and seed first the fit, then its evaluations."""
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
        """The configs of the student and the teacher for `opcd evaluate`."""
        student = self.config["model"]["student"]
        teacher = (self.config["model"]["teacher"].get("init_args") or {}).get("model") or student
        return student, teacher

    def _evaluations(self, name: str) -> list[dict[str, Job]]:
        """Key of the measure -> job, for each seed."""
        measured = [key for key in self.measured if name != TEACHER or key == "task"]
        if name in TRAINED:
            # The exported folder contains tokenizer and template.
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
        """Parse all evaluations, and check each combination of rows, context and model with a model that exists now."""
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
        """Raise UserError if games of the measure are also in the training data."""
        train = self.config["data"]["train"]
        if not isinstance(train, dict) or not isinstance(measured, GameSeeds):
            return
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--train", type=ExampleSource)
        shared = parser.instantiate(parser.parse_object({"train": train})).train.overlap(measured)
        if shared is not None:
            raise UserError(f"{key}: its data and data.train share {shared}; give each its own")


def _check_metric(key: str, measure: Measure, evaluator: Evaluator) -> None:
    """Check that a measure is one task, and that each answer has a score for its metric.

    Raises:
        UserError: the message names the metrics with scores.
    """
    if list(evaluator.answers) != [measure.name]:
        raise UserError(f"{key}.name: {measure.name} is a group of {len(evaluator.answers)} tasks; name one of them")
    known = evaluator.row_metrics(measure.name)
    if measure.metric not in known:
        others = or_all(measure.metric, known)
        raise UserError(f"{key}.metric: the answers to {measure.name} have no score {measure.metric!r}{others}")
