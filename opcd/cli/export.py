"""`opcd export RUN --to hf | merged | gguf | hub`: write a trained student, and compare the copy with its source.

RUN is a run's folder (runs/version_N: its student/, or else its newest complete checkpoint), or a student's folder.

    opcd export runs/version_0 --to gguf --out student.gguf
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from opcd.config.parsing import Parser
from opcd.export.export_check import Behaviour, behaviour, check_same, round_weights
from opcd.export.gguf_writer import ROUNDED, check_architecture, read_gguf, splitting_rule, write_gguf
from opcd.export.hub_upload import check_hub, push
from opcd.export.source import KEY, Source, Trust, find_source, load_folder
from opcd.models import load_tokenizer
from opcd.models.model_card import model_card
from opcd.modules.lm.adapters import NOT_MERGED, has_adapter, merged
from opcd.modules.student import Student
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import atomic_write, explained, require_room, require_writable
from opcd.runtime.files.user_files import refuse_existing

TARGETS = {
    "hf": "a folder for transformers, with the weights or the trained adapter",
    "merged": "a folder for transformers, with the adapter merged into its base",
    "gguf": "one file for llama.cpp and Ollama; an adapter is merged",
    "hub": "the folder of hf, on the Hugging Face hub",
}


def main(args: list[str]) -> int:
    """Export, and print how the copy differs from the student. Returns 0.

    Raises:
        UserError: the options do not fit, or the copy differs from the student; nothing is left in place.
    """
    options = make_parser().parse_args(args)
    _check_options(options)
    source = find_source(options.run, Trust(options.trust_remote_code, options.pickled_weights))
    dtype = getattr(torch, options.dtype) if options.dtype else source.dtype
    _check_source(source, options)
    if options.to == "hub":
        with TemporaryDirectory(prefix="opcd-export-") as folder:
            _write_folder(source, Path(folder) / "student", dtype, merge=False, publish=True)
            print(f"pushed: {push(Path(folder) / 'student', options.repo, options.private)}")
        return 0
    require_writable(options.out, "--out")
    with atomic_write(options.out) as scratch:
        if options.to == "gguf":
            _write_gguf(source, scratch, dtype, options.run.resolve())
        else:
            _write_folder(source, scratch, dtype, merge=options.to == "merged")
    print(f"written: {options.out}")
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(prog="opcd export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar=KEY, help="a run's folder, or a student's")
    parser.add_argument("--to", required=True, choices=TARGETS, help="; ".join(f"{k}: {v}" for k, v in TARGETS.items()))
    parser.add_argument("--out", type=Path, help="the folder or .gguf file to write; it must not exist")
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, help="type of merged and gguf; default: the student's")
    parser.add_argument("--repo", metavar="ORG/NAME", help="for hub: the repository, which is made if needed")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    parser.add_argument("--pickled_weights", action="store_true", help="read pickled weights")
    parser.add_argument("--private", action="store_true", help="for hub: make the repository private")
    return parser


def _check_options(options: argparse.Namespace) -> None:
    to = options.to
    if to == "hub" and options.repo is None:
        raise UserError("--to hub needs --repo ORG/NAME")
    if to == "hub" and options.out is not None:
        raise UserError("--out has no effect with --to hub; remove it")
    if to != "hub" and (options.repo is not None or options.private):
        raise UserError(f"--repo and --private are for --to hub; --to {to} needs --out")
    if options.dtype is not None and to not in ("merged", "gguf"):
        raise UserError(f"--dtype has no effect with --to {to}, which keeps the student's own; remove it")
    if to == "hub":
        return
    if options.out is None:
        raise UserError(f"--to {to} needs --out: the {'file' if to == 'gguf' else 'folder'} to write")
    if to == "gguf" and options.out.suffix != ".gguf":
        raise UserError(f"--out: {options.out} must end in .gguf")
    if to == "gguf" and options.out.is_dir():
        raise UserError(f"--out: {options.out.resolve()} is a folder; name a new file")
    refuse_existing(options.out, "--out")


def _check_source(source: Source, options: argparse.Namespace) -> None:
    if options.to == "merged" and not source.adapted:
        raise UserError(f"--to merged: {options.run} has no adapter to merge; --to hf writes its weights")
    if options.to in ("merged", "gguf") and source.is_cartridge:
        raise UserError(f"--to {options.to}: {NOT_MERGED}")
    architecture = source.architecture  # UserError if the base is missing
    if options.to == "gguf":
        check_architecture(architecture)
        splitting_rule(load_tokenizer(source.model, KEY))
    if options.to == "hub":
        check_hub(source, options.repo, options.private)


def _write_folder(source: Source, out: Path, dtype: torch.dtype, merge: bool, publish: bool = False) -> None:
    student, facts = source.load()
    adapter = has_adapter(student.model) and not merge
    model = replace(source.model, name=str(out), tokenizer=None, chat_template=None, revision=None)
    if adapter:
        expected = behaviour(student)
    else:
        model = replace(model, quantization="none")
        student, expected = _rounded(source, student, dtype, 1)
    with _room(student, out, None if adapter else dtype):
        student.save(out, None if adapter else dtype)
    facts = facts.published() if publish else facts
    facts.write(out)
    (out / "README.md").write_text(model_card(facts, adapter), encoding="utf-8")
    del student
    _compare(expected, load_folder(model))


def _write_gguf(source: Source, out: Path, dtype: torch.dtype, run: Path) -> None:
    student, facts = source.load()
    student, expected = _rounded(source, student, dtype, ROUNDED)
    with _room(student, out, dtype):
        write_gguf(student, out, dtype, f"{Path(facts.base).name} {run.name}")
    del student
    _compare(expected, read_gguf(out))


@contextmanager
def _room(student: Student, out: Path, dtype: torch.dtype | None) -> Iterator[None]:
    """Raise UserError if the student does not fit on the disk, before and during the write. No `dtype`: an adapter."""
    weights = {weight.data_ptr(): weight for weight in student.model.parameters()}.values() if dtype else ()
    needed = sum(weight.numel() * dtype.itemsize for weight in weights) if dtype else 0
    require_room(out, needed)
    with explained(out, needed):
        yield


def _rounded(source: Source, student: Student, dtype: torch.dtype, dimensions: int) -> tuple[Student, Behaviour]:
    """Merge the adapter, and round weights of at least `dimensions` dimensions to `dtype`. Prints the differences.

    Returns the student and its behaviour.
    """
    trained = behaviour(student)
    if has_adapter(student.model):
        student = Student(merged(student.model, torch.float32).eval(), student.tokenizer)
        if source.model.quantization == "8bit":
            print("merged: not compared with the adapter over its base, whose 8-bit layers round their inputs")
        else:
            difference = check_same(trained, student, "the merged model")
            print(f"merged: logits {difference:.2g} from those of the adapter over its base")
    round_weights(student.model, dtype, dimensions)
    expected = behaviour(student)
    if torch.equal(trained.answer, expected.answer):
        moved = float((trained.logits - expected.logits).abs().max())
        print(f"rounded to {str(dtype)[6:]}: logits {moved:.2g} from those of the student, the same greedy answer")
    else:
        print(f"rounded to {str(dtype)[6:]}: another greedy answer than the student's; --dtype float32 keeps it")
    return student, expected


def _compare(expected: Behaviour, copy: Student) -> None:
    """Compare a copy with the expected behaviour, and print the difference. UserError if it is too large."""
    difference = check_same(expected, copy, "what was written")
    print(
        f"loaded again: logits at most {difference:.2g} from those of the student (the largest is "
        f"{expected.logits.abs().max():.3g}), over {len(expected.logits)} positions; the same greedy answer"
    )
