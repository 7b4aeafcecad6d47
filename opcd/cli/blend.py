"""`opcd blend RUN`: score students between a run's start and its end, and keep one.

opcd blend runs/version_0 --scales 0.5 0.75 1.0
opcd blend runs/version_0 --tasks contains --data.contains VAL.jsonl
opcd blend runs/version_0 --keep 0.75 --out student
"""

import json
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from opcd.accel.precision import device_of
from opcd.callbacks import RecoveryAndDrift
from opcd.callbacks.recovery_and_drift import Measurement
from opcd.cli.fit import fit_parser
from opcd.data import ContextQueryDataModule, ExampleSource
from opcd.evaluation.evaluation_config import Evaluation
from opcd.evaluation.evaluation_run import Evaluator
from opcd.evaluation.scores import Results
from opcd.export.export_check import behaviour, check_same
from opcd.export.source import Source, Trust, find_source, load_folder
from opcd.games import GameSeeds
from opcd.models import load_model
from opcd.models.key_value_prefix import prefix_of
from opcd.models.model_card import model_card
from opcd.modules import Distiller
from opcd.modules.lm.adapters import has_adapter
from opcd.modules.lm.generation import computing_dtype
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import atomic_write, require_writable, write_atomic
from opcd.runtime.files.user_files import refuse_existing
from opcd.runtime.output import markdown
from opcd.runtime.versions import VERSION

DESCRIPTION = """Score students between a run's start and its end: recovery and drift, as in training, and tasks.

Each has the weights start + scale (student - start), in float32; an adapter's product B A is scaled. Validation rows
alone are asked: the run's data.val, and tasks without a test split. The table stands in RUN/blend.json, too."""
FILE = "blend.json"
SCALES = [0.5, 0.75, 1.0]
OF_A_CONTEXT = {"context", "placement", "template", "shared_prefix"}
"""Settings of an evaluation that are not offered: the student answers without the context."""


@dataclass
class Score:
    """What was measured at one scale."""

    scale: float
    measured: Measurement
    results: Results


def main(args: list[str]) -> int:
    """Print and write the table; write the student of `--keep`. Returns 0. UserError for mistakes of the user."""
    options = make_parser().parse_args(args)
    run, scales = Path(options.run), _scales(options)
    if options.keep is not None:
        refuse_existing(Path(options.out), "--out")
        require_writable(Path(options.out), "--out")
    trainer, distiller, data, measure = _of_run(run, options.val)
    config, device = distiller.student_config, device_of(str(trainer.accelerator))
    source = find_source(run, Trust(config.trust_remote_code, config.pickled_weights))
    evaluator = _evaluator(options, source, data)
    blend = Blend(distiller, source, device)
    blend.scale(0.0)
    distiller.teacher.setup(blend.student, config, device)
    scores = []
    with torch.autocast(device.type, torch.bfloat16, enabled=str(trainer.precision) == "bf16-mixed"):
        measure.record(distiller, data, computing_dtype(trainer.precision, torch.float32))
        measure.measured.append(measure.compare(distiller, 0))
        for scale in scales:
            blend.scale(scale)
            measured = measure.compare(distiller, blend.facts.steps or 0)
            scores.append(Score(scale, measured, evaluator(blend.student) if evaluator else {}))
    print("\n".join(table(scores)))
    write_atomic(run / FILE, json.dumps(_plain(scores, evaluator), indent=1) + "\n")
    if options.keep is not None:
        blend.scale(options.keep)
        blend.write(Path(options.out), next(score for score in scores if score.scale == options.keep))
        print(f"\nwritten: {options.out}")
    return 0


def make_parser() -> ArgumentParser:
    """The options: the command's own, and those of an evaluation."""
    parser = ArgumentParser(prog="opcd blend", description=DESCRIPTION, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("run", type=str, help="a run's folder")
    parser.add_argument("--scales", type=float, nargs="+", help="0 is the start, 1 the student; default: 0.5 0.75 1")
    parser.add_argument("--keep", type=float, help="score and write the student of this scale")
    parser.add_argument("--out", type=str, help="the folder that --keep writes; it must not exist")
    parser.add_argument("--val", type=str, help="held-out queries in place of the run's data.val")
    parser.add_argument("--tasks", type=list[str] | str, help="tasks on validation rows, as for opcd evaluate")
    parser.add_class_arguments(Evaluation, None, skip={"tasks", *OF_A_CONTEXT})
    return parser


def table(scores: list[Score]) -> list[str]:
    """The lines of a Markdown table: recovery, drift and the first metric of each task, with 95 % intervals."""
    tasks = {name: next(iter(result.metrics)) for name, result in scores[0].results.items()}
    head = ["scale", "recovery", "drift, nats a token", *(f"{name}: {metric}" for name, metric in tasks.items())]
    rows = [head, ["---"] * len(head)]
    for score in scores:
        one = score.measured
        row = [f"{score.scale:g}", _shown(one.recovery, one.recovery_low, one.recovery_high, "{:.1%}")]
        row.append(_shown(one.drift, one.drift_low, one.drift_high, "{:.4f}"))
        for name, metric in tasks.items():
            value = score.results[name].metrics[metric]
            row.append(_shown(value.value, value.low, value.high, "{:.3f}"))
        rows.append(row)
    return [f"| {' | '.join(cell if cell == '---' else markdown(cell) for cell in row)} |" for row in rows]


class Blend:
    """A student whose weights lie between the start and the end of its training.

    Args:
        distiller: gets the student.
        source: the end.
        device: of the student.

    Raises:
        UserError: the two have other weights, so that nothing lies between them.
    """

    def __init__(self, distiller: Distiller, source: Source, device: torch.device) -> None:
        self.source = source
        self.student, self.facts = source.load()
        if prefix_of(self.student.model) is not None:
            raise UserError(
                f"RUN: {source.model.name} is a Cartridge: its keys and values are no change of the weights, so "
                "there is nothing between start and end"
            )
        self.student.model.to(device)  # type: ignore[arg-type]
        distiller.student = self.student
        weights = dict(self.student.model.named_parameters())
        if has_adapter(self.student.model):  # the change is B A: with B alone it scales
            weights = {name: weight for name, weight in weights.items() if ".lora_B." in name}
            self._start = {name: torch.zeros_like(weight) for name, weight in weights.items()}
            self._dtype = None
        else:
            start = replace(distiller.student_config, dtype="float32", quantization="none")
            self._start = dict(load_model(start, key="model.student", device=device).named_parameters())
            self._dtype = source.dtype
        shapes, start_shapes = ({name: x.shape for name, x in side.items()} for side in (weights, self._start))
        if not weights or shapes != start_shapes:
            raise UserError(f"RUN: {source.model.name} has other weights than {distiller.student_config.name}")
        self._end = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def scale(self, scale: float) -> None:
        """Set the weights to start + scale (end - start), as they would be written."""
        for name, end in self._end.items():
            weight = self.student.model.get_parameter(name)
            blended = torch.lerp(self._start[name].to(end), end, scale)  # exact at 0 and 1
            weight.copy_(blended.to(self._dtype or blended.dtype))

    def write(self, out: Path, score: Score) -> None:
        """Write the student as a run writes its `student/`. UserError if the folder, read again, answers otherwise."""
        words, expected = score.measured.in_words(), behaviour(self.student)
        facts = replace(self.facts, scale=score.scale, recovery=words.get("recovery"), drift=words.get("drift"))
        with atomic_write(out) as folder:
            self.student.save(folder, self._dtype)
            facts.write(folder)
            (folder / "README.md").write_text(model_card(facts, self._dtype is None), encoding="utf-8")
            kept = replace(self.source.model, name=str(folder), tokenizer=None, chat_template=None, revision=None)
            check_same(expected, load_folder(kept), "what was written")


def _scales(options: Namespace) -> list[float]:
    """The scales to score, which `--keep` is one of. UserError for options that do not fit together."""
    scales: list[float] = options.scales or ([] if options.keep is not None else SCALES)
    if options.keep is not None:
        scales = [*scales, options.keep]
    if (options.keep is None) != (options.out is None):
        raise UserError("--keep SCALE and --out FOLDER go together: one names the student, the other the folder")
    for scale in scales:
        if not 0 <= scale <= 2:
            raise UserError(f"--scales: {scale:g} must lie between 0 (the start) and 2; 1 is the student")
    return sorted(set(scales))


def _of_run(run: Path, val: str | None) -> tuple[Any, Distiller, ContextQueryDataModule, RecoveryAndDrift]:
    """The parts of a run, from its config: the trainer's settings, model and data without weights, what measures."""
    if not (run / "config.yaml").is_file():
        raise UserError(f"RUN: {run.resolve()} is no run of `opcd fit`: it has no config.yaml")
    parser = fit_parser()
    words = ["--config", str(run / "config.yaml"), *([] if val is None else ["--data.val", val])]
    try:
        config = parser.parse_args(words)
        callbacks = config.trainer.callbacks or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        config.trainer.callbacks = [each for each in callbacks if each.class_path.endswith(RecoveryAndDrift.__name__)]
        config.trainer.logger = False
        made = parser.instantiate_classes(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    if made.data.sources["val"] is None:
        raise UserError("RUN: it has no data.val, and a scale is chosen on held-out queries: name some (--val ROWS)")
    made.data.setup("validate")
    validate(Run(made.model, made.data, "validate"))
    return made.trainer, made.model, made.data, next(iter(made.trainer.callbacks), RecoveryAndDrift())


def _evaluator(options: Namespace, source: Source, data: ContextQueryDataModule) -> Evaluator | None:
    """The tasks to ask, if there are any.

    Raises:
        UserError: a task has test rows, on which nothing is chosen; or an option has no effect.
    """
    given = {each.name: options[each.name] for each in fields(Evaluation) if each.name in options}
    if options.tasks is None:
        for each in fields(Evaluation):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            if each.name != "tasks" and each.name in given and given[each.name] != default:
                raise UserError(f"--{each.name} has no effect without --tasks; remove it")
        return None
    try:
        evaluator = Evaluator(Evaluation(**given), source.model, key="RUN", prefix="")
    except ValueError as error:
        raise UserError(str(error)) from error
    test = data.sources["test"]
    for task in evaluator.tasks:
        rows = evaluator.evaluation.data.get(task.name)
        if rows is None and task.task.config.test_split is not None:  # type: ignore[union-attr]
            raise UserError(
                f"--tasks: {task.name} asks its test rows, and a scale is chosen on validation rows; take rows of "
                "your own (--data.TASK), or a task that has a validation_split alone"
            )
        if _same_rows(rows, test):
            raise UserError(f"--data.{task.name}: these are the run's data.test; a scale is chosen on validation rows")
    return evaluator


def _same_rows(rows: str | GameSeeds | None, test: str | ExampleSource | None) -> bool:
    if isinstance(rows, str) and isinstance(test, str):
        return rows == test or Path(rows).expanduser().resolve() == Path(test).expanduser().resolve()
    return isinstance(rows, ExampleSource) and isinstance(test, ExampleSource) and rows.overlap(test) is not None


def _plain(scores: list[Score], evaluator: Evaluator | None) -> dict[str, Any]:
    """The scores for JSON."""
    rows = []
    for score in scores:
        tasks = {
            name: {"n": result.n, "metrics": {metric: asdict(value) for metric, value in result.metrics.items()}}
            for name, result in score.results.items()
        }
        rows.append({"scale": score.scale, **asdict(score.measured), "tasks": tasks})
    return {"opcd": VERSION, "scales": rows, "settings": evaluator.settings() if evaluator else None}


def _shown(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return "not measured"
    interval = "" if low is None or high is None else f" ({form.format(low)} to {form.format(high)})"
    return form.format(value) + interval
