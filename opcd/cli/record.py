"""`opcd record`: write responses and the teacher's likeliest tokens to disk, for trainings without the teacher.

With `--writer student` the responses are those of the student before training, without the context (arXiv:2610.11291).
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opcd.cli.fit import fit_parser
from opcd.config.parsing import Parser
from opcd.config.precheck import checked
from opcd.data import ContextQueryDataModule
from opcd.models import architecture, load_tokenizer
from opcd.modules import RecordedRollout, RecordedTeacher, Student
from opcd.modules.fixed_responses import likeliest
from opcd.modules.teachers.record_folder import Origin, RecordWriter, tokenizer_hash
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError

WRITERS = {"teacher": "TeacherRollout", "student": "StudentRollout"}
"""Who may write the responses, and the rollout that lets it."""


def main(args: list[str]) -> int:
    """Record the config's teacher on data.train. Returns 0."""
    options, rest = make_parser().parse_known_args(args)
    for name in ("k", "samples", "shard_rows"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} must be at least 1, got {getattr(options, name)}")
    parser = fit_parser()
    try:
        config = parser.parse_args(checked("fit", rest))
        config.trainer.logger, config.trainer.callbacks = False, None
        made = parser.instantiate_classes(config)
    except ValueError as error:
        raise UserError(str(error)) from error
    _record(made.model, made.data, int(made.seed_everything or 0), options)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's own options, without those of `opcd fit`."""
    parser = Parser(
        prog="opcd record",
        description="Write responses to data.train, and the likeliest tokens of model.teacher at each of their "
        "positions, to a folder. All other options are those of `opcd fit`: give the config of the run that will read "
        "the record.",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="the record's folder; a stopped record continues"
    )
    parser.add_argument(
        "--writer",
        choices=WRITERS,
        default="teacher",
        help="who writes the responses: teacher, with the context (model.rollout: TeacherRollout), or student, the "
        "student before training without the context (model.rollout: StudentRollout) (default: %(default)s)",
    )
    parser.add_argument("--k", type=int, default=64, help="tokens for each position (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=1, help="responses for each query (default: %(default)s)")
    parser.add_argument("--shard_rows", type=int, default=256, help="queries in each file (default: %(default)s)")
    return parser


def _record(distiller: Any, data: ContextQueryDataModule, seed: int, options: argparse.Namespace) -> None:
    teacher, rollout = distiller.teacher, distiller.rollout
    if not (teacher.frozen and teacher.stands_alone and "distribution" in teacher.provides):
        raise UserError(
            "opcd record needs a frozen teacher that runs without the student (model.teacher: FrozenTeacher), not "
            f"{type(teacher).__name__}: a record holds no scores that change with the student; record several teachers "
            "one by one"
        )
    if rollout.writer != options.writer or rollout.sampling is None:
        other = f", or give --writer {rollout.writer}" if rollout.writer in WRITERS and rollout.sampling else ""
        raise UserError(
            f"opcd record needs model.rollout: {WRITERS[options.writer]} for --writer {options.writer}, not "
            f"{type(rollout).__name__}; change it{other}"
        )
    data.setup("fit")
    validate(Run(distiller, data))
    examples = data.examples("train")
    tokenizer = load_tokenizer(distiller.student_config)
    config = teacher.config or distiller.student_config
    origin = Origin(
        teacher=config.name,
        tokenizer=tokenizer_hash(tokenizer),
        context=data.context_hash,
        rows=len(examples),
        samples=options.samples,
        temperature=distiller.objective.temperature,
        k=options.k,
        sampling=vars(rollout.sampling),
        seed=seed,
        student=distiller.student_config.name if options.writer == "student" else None,
    )
    writer = RecordWriter(options.out, origin)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    teacher.setup(None, distiller.student_config, device)  # it needs no student
    if options.writer == "student":
        student = Student.load(distiller.student_config, adapter=distiller.adapter, device=device).to(device)
    else:
        student = Student(teacher.model, tokenizer)  # for its end and pad tokens
    with rollout.active(student):
        for first in range(0, len(examples), options.shard_rows):
            part = examples[first : first + options.shard_rows]
            if writer.rows > first * options.samples:
                continue
            torch.manual_seed(seed + first)  # the same draws if the command was stopped before
            size = data.batch_size
            batches = (part[start : start + size] for start in range(0, len(part), size))
            rows = [_batch(data, distiller, student, batch, options) for batch in batches]
            prompts, responses = ([x for row in rows for x in row[column]] for column in (0, 1))
            writer.add(prompts, responses, torch.cat([row[2] for row in rows]), torch.cat([row[3] for row in rows]))
            print(f"{writer.rows} of {len(examples) * options.samples} responses in {options.out}", flush=True)
    print("recorded; to train from it:")
    for key, reader in (("teacher", RecordedTeacher), ("rollout", RecordedRollout)):
        print(f"model.{key}: {{class_path: {reader.__name__}, init_args: {{folder: {options.out}}}}}")


@torch.no_grad()
def _batch(
    data: ContextQueryDataModule, distiller: Any, student: Student, examples: list[Any], options: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Prompts, responses, and for N response tokens the k likeliest tokens and their log-probabilities, [N, k]."""
    teacher = distiller.teacher
    batch = data.encode([example for example in examples for _ in range(options.samples)]).to(teacher.model.device)
    trajectories = distiller.rollout.generate(student, teacher, batch)
    states = teacher.score(trajectories, distiller.micro_batch_tokens)
    # The student's vocabulary, as in training with the teacher: further tokens of either model are padding.
    vocabulary = architecture(distiller.student_config).get_text_config().vocab_size
    recorded = likeliest(states, options.k, vocabulary, distiller.objective.temperature)
    return trajectories.teacher_prompts, trajectories.responses, recorded.tokens, recorded.log_probs
