"""`opcd queries`: questions to a context, so that a context alone is enough to train on.

    opcd queries --context manual.md --out queries
    opcd fit --config configs/quickstart.yaml --data.train queries/train.jsonl --data.val queries/val.jsonl \\
        --data.context queries/context.txt

The same command resumes where it was stopped.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from opcd.cli.evaluate import torch_device
from opcd.config.parsing import Parser
from opcd.models import ModelConfig
from opcd.queries.askers import Asker, ModelAsker, ServerAsker, TriedOutBy
from opcd.queries.documents import read_documents
from opcd.queries.making import MOST_ROUNDS, PROMPTS, Maker, Plan, Rows, kind_of, rows
from opcd.queries.parts import Chunk, chunks
from opcd.runtime.errors import UserError
from opcd.runtime.files.disk import write_atomic
from opcd.serving.client import Server
from opcd.sweep.job_engine import locked
from opcd.writing.claimed_folder import claim, write_records
from opcd.writing.journal import Journal

JOURNAL, TRAIN, VAL, REPORT, CONTEXT = "asked.jsonl", "train.jsonl", "val.jsonl", "report.json", "context.txt"
PROMPT_TOKENS = 400
"""About the most tokens that a prompt has beside a chunk: its words, and what was asked before."""
DEFAULT_CHUNK = 1500
KEY_ENV = "OPENAI_API_KEY"


def main(args: list[str]) -> int:
    """Write train.jsonl, val.jsonl and report.json. Returns 0.

    Raises:
        UserError: a context, a model or an option is wrong, or no question was kept.
    """
    options = make_parser().parse_args(args)
    if not options.dry_run:
        made = make(options)
        print_counts(made)
        _print_next(options.out, made)
        return 0
    maker, _ = _maker(options)
    prompts = sum(maker.asker.count(request) for request in maker.prompts_of_a_round())
    print(f"{len(maker.chunks)} chunks, {len(maker.parts)} parts ({maker.plan.kind})")
    print(f"a round: {len(maker.parts)} questions, {prompts} tokens of prompts, and at most")
    print(f"{len(maker.parts) * options.max_new_tokens} written; each question that passes the rules is answered twice")
    print(f"at most {MOST_ROUNDS} rounds, until there are enough questions")
    return 0


def make(options: argparse.Namespace) -> Rows:
    """Make the questions and write the files."""
    maker, identity = _maker(options)
    with locked(options.out):
        claim(options.out, identity)
        maker.run()
    made = rows(maker)
    if len(maker.chunks) == 1:
        write_atomic(options.out / CONTEXT, maker.chunks[0].text + "\n")
    write_records(options.out / TRAIN, made.train)
    if made.val:
        write_records(options.out / VAL, made.val)
    write_atomic(options.out / REPORT, json.dumps(made.report, indent=1, ensure_ascii=False) + "\n")
    return made


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = Parser(
        prog="opcd queries",
        description="Write questions to a context: rows for `opcd fit`. Each question is tried out: it is kept where "
        "the context changes the model's answer. The same command resumes where it was stopped.",
    )
    parser.add_argument(
        "--context",
        nargs="+",
        required=True,
        metavar="FILE",
        help="documents or a system prompt: text, Markdown, HTML, PDF or DOCX",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new, or one to resume")
    parser.add_argument("--model", default=None, help="writes the questions; a name, folder or hub id; smollm2-135m")
    parser.add_argument(
        "--student",
        help="tries the questions out: the model that you will train; default: the one that writes them",
    )
    parser.add_argument("--server", metavar="URL", help="a server of the OpenAI protocol in place of a model here")
    parser.add_argument("--name", metavar="MODEL", help="the model's name on the server")
    parser.add_argument("--api_key_env", metavar="NAME", help=f"variable with the server's key (default: {KEY_ENV})")
    parser.add_argument(
        "--kind",
        choices=["auto", "facts", "manner"],
        default="auto",
        help="what the context holds: facts to know, or a manner to answer in; auto: told from its sentences",
    )
    parser.add_argument("--count", type=int, help="rows to train on; default: three for each part of the context")
    parser.add_argument("--val", type=int, default=16, help="rows to hold out (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (default: %(default)s)")
    parser.add_argument(
        "--chunk_tokens",
        type=int,
        help="most tokens of a chunk; a longer context is cut, and each row gets its chunk as context "
        f"(default: {DEFAULT_CHUNK}, or what the model's window leaves)",
    )
    parser.add_argument("--max_new_tokens", type=int, default=48, help="of a question (default: %(default)s)")
    parser.add_argument("--answer_tokens", type=int, default=32, help="of an answer (default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.3, help="questions are drawn at it (default: %(default)s)"
    )
    parser.add_argument("--prompts", type=Path, metavar="FOLDER", help=f"files that replace those of {PROMPTS}")
    parser.add_argument("--device", help="a torch device; default: a GPU where there is one")
    parser.add_argument("--dry_run", action="store_true", help="tell how many calls and tokens it takes, and stop")
    return parser


def _maker(options: argparse.Namespace) -> tuple[Maker, dict[str, Any]]:
    """What makes the questions, and the settings that they depend on."""
    _check(options)
    documents = read_documents(options.context)
    asker = _asker(options)
    most = _chunk_tokens(options, asker)
    cut: list[Chunk] = chunks(documents, most, asker.count)
    text = "\n\n".join(document.text for document in documents)
    kind = kind_of(text) if options.kind == "auto" else options.kind
    plan = Plan(kind, options.count, options.val, options.seed, options.temperature, options.prompts)
    maker = Maker(asker, cut, plan, Journal(options.out / JOURNAL))
    identity: dict[str, Any] = {
        "context": hashlib.sha256(text.encode()).hexdigest(),
        "model": asker.name,
        "server": options.server,
        "kind": kind,
        "count": options.count,
        "val": options.val,
        "seed": options.seed,
        "chunk_tokens": most,
        "max_new_tokens": options.max_new_tokens,
        "answer_tokens": options.answer_tokens,
        "temperature": options.temperature,
    }
    return maker, identity | {"prompts": maker.prompt_texts}


def _check(options: argparse.Namespace) -> None:
    if not 0 <= options.temperature <= 2:
        raise UserError(f"--temperature must be from 0 to 2, got {options.temperature}")
    least = {"count": 1, "val": 0, "chunk_tokens": 16, "max_new_tokens": 4, "answer_tokens": 4}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise UserError(f"--{name} must be at least {smallest}, got {value}")
    if options.server is None and options.name is not None:
        raise UserError("--name is a model on a server: give --server too, or use --model")
    if options.server is not None and (options.name is None or options.model is not None):
        raise UserError("--server wants --name, the model's name there, and no --model")
    if options.server is None and options.api_key_env is not None:
        raise UserError("--api_key_env has no effect without --server; remove it")
    if options.server is not None and options.student is None and options.device is not None:
        raise UserError("--device has no effect where a server writes and answers; remove it, or give --student")
    if options.prompts is not None and not options.prompts.is_dir():
        raise UserError(f"--prompts: {options.prompts} is not a folder")


def _asker(options: argparse.Namespace) -> Asker:
    writer = _writer(options)
    return writer if options.student is None else TriedOutBy(writer, _model(options, options.student, "--student"))


def _writer(options: argparse.Namespace) -> Asker:
    if options.server is None:
        return _model(options, options.model or ModelConfig().name, "--model")
    try:
        server = Server(options.server, options.api_key_env or KEY_ENV, concurrency=8, timeout=120.0, patience=300.0)
    except ValueError as error:
        raise UserError(str(error)) from error
    return ServerAsker(server, options.name, options.max_new_tokens, options.answer_tokens)


def _model(options: argparse.Namespace, model: str | ModelConfig, key: str) -> ModelAsker:
    device, config = torch_device(options.device), ModelConfig(model) if isinstance(model, str) else model
    return ModelAsker(config, key, device, options.max_new_tokens, options.answer_tokens)


def _chunk_tokens(options: argparse.Namespace, asker: Asker) -> int:
    """Tokens of a chunk: what the model's window leaves beside a prompt and an answer."""
    beside = PROMPT_TOKENS + max(options.max_new_tokens, options.answer_tokens)
    most = None if asker.window is None else asker.window - beside
    if most is not None and most < 64:
        raise UserError(f"--model {asker.name}: its window of {asker.window} tokens is too small for a context")
    if options.chunk_tokens is None:
        return min(DEFAULT_CHUNK, most or DEFAULT_CHUNK)
    if most is not None and options.chunk_tokens > most:
        raise UserError(f"--chunk_tokens {options.chunk_tokens}: {asker.name} has room for {most} beside a prompt")
    return int(options.chunk_tokens)


def print_counts(made: Rows) -> None:
    """Print what was kept and dropped, and how much of the context is covered."""
    report = made.report
    print(f"{report['kept']} of {report['asked']} questions kept ({report['kind']}, {report['model']})")
    if report["train"] < (report["wanted"] or 0):
        print(f"  {report['train']} rows to train on, not {report['wanted']}: no more came in {MOST_ROUNDS} rounds")
    for why, count in report["dropped"].items():
        print(f"  dropped {count}: {why}")
    for chunk, covered in report["coverage_by_chunk"].items():
        print(f"  chunk {chunk}: {covered} have a question")


def _print_next(folder: Path, made: Rows) -> None:
    """Print the files, and what to type next."""
    print(f"wrote {folder / TRAIN} ({len(made.train)} rows), {folder / VAL} ({len(made.val)}) and {folder / REPORT}")
    context = folder / CONTEXT if (folder / CONTEXT).is_file() else "null"
    val = folder / VAL if made.val else "null"
    print("next:\n    opcd fit --config configs/quickstart.yaml", end=" ")
    print(f"--data.train {folder / TRAIN} --data.val {val} --data.context {context}")
