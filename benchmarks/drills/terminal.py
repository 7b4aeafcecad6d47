"""A drill of control characters in foreign text: each place of such text, shown by each command."""

import io
import json
import logging
import random
import re
import shlex
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from huggingface_hub import constants
from rich.table import Table

from benchmarks.drills.fits import Outcome
from benchmarks.tiny import make_tiny
from opcd.chat.chat_models import Speaker
from opcd.cli import main as cli
from opcd.modules import Distiller
from opcd.runtime.output import CONTROL, Screen, plain

PLANTED = "\x1b]52;c;cGxhbnRlZA==\x07\x1b[2J\x1b[8m\x9b2J\u202e\u2066\x08\x7f"
"""Clipboard access, a cleared screen, hidden text, a C1 sequence, reversed text, backspaces."""
MARK = r"\x1b]52;c;"
"""The part that must be visible, in escaped form."""
OWN = re.compile(r"\x1b\[(?:[0-79;]|8[;0-9]|[1-7]8)*m|\x1b\[\d*[ABCDK]|\x1b\[2K|\x1b\[\?25[lh]|\r")
"""Sequences that rich itself writes to a terminal: colours, moves, the cursor; none of them hides text."""
PIECES = (
    "\x1b",
    "\x9b",
    "\x07",
    "\x08",
    "\x7f",
    "\r",
    "]0;x\x07",
    "[3J",
    "[8m",
    "\u202e",
    "\u2067",
    "\u2028",
    "c",
    "a",
)
OPTIONS = "--trainer.max_steps 1 --trainer.accelerator cpu --trainer.precision 32-true --data.batch_size 2"


class Case(NamedTuple):
    """A place of planted text, and a command that shows it.

    Attributes:
        code: the exit code; None if it depends on the machine.
        page: a file that the command writes for people.
        seen: whether the output must show the planted text; a message may omit it.
    """

    place: str
    words: list[str]
    code: int | None
    page: Path | None = None
    seen: bool = True


class _Terminal(io.StringIO):
    """A stream with a fixed `isatty`."""

    def __init__(self, terminal: bool, text: str = "") -> None:
        super().__init__(text)
        self.terminal = terminal

    def isatty(self) -> bool:
        """The fixed value."""
        return self.terminal


class _Now:
    """The current standard error, for handlers that keep the stream of the time of their import."""

    def write(self, text: str) -> int:
        """Write to the current standard error."""
        return sys.stderr.write(text)

    def flush(self) -> None:
        """Flush the current standard error."""
        sys.stderr.flush()


def terminal(runs: int, folder: Path) -> Outcome:
    """Check that no planted control character reaches standard output or error, and that all are visible escaped."""
    outcome, draw = Outcome(), random.Random(0)
    table = Table("planted in", "command", "output", "reached it raw", "seen escaped")
    for number in range(runs):
        text = PLANTED + "".join(draw.choices(PIECES, k=12)) * bool(number)
        where = folder / str(number)
        where.mkdir(parents=True)
        with _server(text) as address:
            for case in _cases(where, text, address):
                for is_terminal in (False, True):
                    reached, code = _shown(case, text, is_terminal, where)
                    foreign = OWN.sub("", reached) if is_terminal else reached
                    raw = sorted({ascii(found)[1:-1] for found in CONTROL.findall(foreign)})
                    problem = None
                    if raw:
                        problem = f"{' '.join(raw)} reached it"
                    elif case.seen and MARK not in reached:
                        problem = "it is not seen"
                    if case.code not in (None, code):
                        problem = f"exit code {code}: {reached[-300:]!r}"
                    if case.page and code == 0 and CONTROL.search(case.page.read_text(encoding="utf-8")):
                        problem = f"{case.page.name} holds it"
                    kind = "terminal" if is_terminal else "pipe"
                    outcome.add(problem and f"{case.place}, {case.words[0]}, {kind}: {problem}")
                    table.add_row(case.place, plain(case.words[0]), kind, " ".join(raw) or "-", str(MARK in reached))
    Screen(width=100, stderr=True).print(table)
    return outcome


def _shown(case: Case, text: str, is_terminal: bool, where: Path) -> tuple[str, int]:
    """The output of a command on both streams, and its exit code."""
    out = _Terminal(is_terminal)
    if case.page:
        case.page.unlink(missing_ok=True)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")  # printed, also where tests make errors of them
        for owner, name, value in (
            (sys, "stdout", out),
            (sys, "stderr", out),
            (sys, "stdin", _Terminal(is_terminal, f"Who is {text}?\n")),
            (sys, "argv", ["opcd"]),
        ):
            stack.enter_context(patch.object(owner, name, value))
        for handler in _handlers():
            stack.enter_context(patch.object(handler, "stream", _Now()))
        if is_terminal:
            stack.enter_context(patch.dict("os.environ", {"TERM": "xterm-256color", "COLUMNS": "200"}))
        answers: Callable[..., list[str]] = Distiller.answers
        said = lambda *given, **named: [f"{answer} {text}" for answer in answers(*given, **named)]  # noqa: E731
        stack.enter_context(patch.object(Distiller, "answers", said))
        stack.enter_context(patch.object(Speaker, "_text", lambda speaker, ids: f"It is {text}."))
        stack.enter_context(patch.object(constants, "HF_HUB_CACHE", str(where / "hub")))
        try:
            code = cli.main(case.words)
        except SystemExit as left:
            code = int(left.code or 0)
        except Exception as error:  # a traceback in the command itself
            return f"{out.getvalue()}{type(error).__name__}: {error!a}", 70
    return out.getvalue(), code


def _handlers() -> list[logging.StreamHandler[Any]]:
    """The stream handlers of all loggers."""
    loggers = [logging.root, *(logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict))]
    found = [handler for logger in loggers for handler in logger.handlers]
    return [handler for handler in found if type(handler) is logging.StreamHandler]


def _cases(where: Path, text: str, address: str) -> Iterator[Case]:
    """All places and commands."""
    name = text.replace("/", "")
    tiny = make_tiny(where / "tiny")
    rows, context, out = where / "rows.jsonl", where / "context.txt", where / "runs"
    rows.write_text("".join(json.dumps({"query": f"{n} {text}", "reference": text}) + "\n" for n in range(2)))
    context.write_text(f"Mind {text}.")
    fit = ["fit", "--model.student.name", str(tiny), "--data.context", str(context), *shlex.split(OPTIONS)]
    fit += ["--model.rollout.init_args.sampling.max_new_tokens", "4", "--model.eval_sampling.max_new_tokens", "4"]
    runs = ["--trainer.default_root_dir", str(out)]
    yield Case("a query, its reference, an answer", [*fit, "--data.train", str(rows), *runs], 0)
    yield Case("the name of a file of rows", [*fit, *runs, "--data.train", str(where / f"no{name}.jsonl")], 2)
    (where / "odd.jsonl").write_text(json.dumps({name: 1}) + "\n")
    yield Case("a row's field", [*fit, *runs, "--data.train", str(where / "odd.jsonl")], 2, seen=False)
    yield Case("an option", [*fit, f"--data.{name}", "1", "--data.train", str(rows)], 2)
    yield Case("a value", [*fit, "--trainer.max_steps", name, "--data.train", str(rows)], 2, seen=False)
    yield Case("a command", [name, str(where / "x")], 2)
    served = ["ServedTeacher", "--model.teacher.init_args.base_url", address, "--model.teacher.init_args.name", name]
    loss = ["--model.loss", "SampledReverseKL"]
    yield Case("a server's words", [*fit, *loss, "--model.teacher", *served, *runs, "--data.train", str(rows)], 2)
    (where / "hub" / f"models--org--{name}").mkdir(parents=True)
    yield Case("a folder of the hub's cache", ["doctor"], None)
    yield from _readers(where, name, text, tiny)


def _readers(where: Path, name: str, text: str, tiny: Path) -> Iterator[Case]:
    """The commands that read files of another run."""
    yield Case("a question and an answer", ["chat", "--max_new_tokens", "2", str(tiny)], 0)
    yield Case("the name of a model", ["chat", str(where / name)], 2)
    yield Case("the name of a run", ["export", "--to", "hf", "--out", str(where / "o"), str(where / name)], 2)
    tasks = ["--tasks", name, "--out", str(where / "o")]
    yield Case("the name of a task", ["evaluate", "--model.name", str(tiny), *tasks], 2, seen=False)
    run = where / f"run{name}"
    run.mkdir()
    (run / "config.yaml").write_text(json.dumps({"data": {"context": text}, "trainer": {}}))
    (run / "metrics.csv").write_text(f"step,train/divergence,{name.replace(chr(13), '')}\n0,1.0,x\n1,2.0,{text}\n")
    sample = {"step": 0, "query": text, "reference": text, "context": False, "answer": text}
    (run / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    page = where / "page.html"
    yield Case("a run's folder and files", ["report", "--out", str(page), str(run)], 0, page)
    experience = where / "experience"
    experience.mkdir()
    (experience / "run.json").write_text(json.dumps({"config": text}))
    attempt = {"list": 0, "step": 1, "transcript": text, "success": None}
    (experience / "attempts.jsonl").write_text(json.dumps(attempt) + "\n")
    lessons = {"number": 0, "step": 1, "lessons": [text], "seen": [1]}
    (experience / "lists.jsonl").write_text(json.dumps(lessons) + "\n")
    numbers = {"lessons": 1, "tokens": 1, "right": 1, "items": 1, "success": 1.0, "low": 0.5, "high": 1.0}
    without = {"right_without": 0, "success_without": 0.0, "low_without": 0.0, "high_without": 0.5}
    chosen = {"number": 0, "step": 1, "id": text, **numbers, **without}
    (experience / "selection.json").write_text(json.dumps(chosen))
    yield Case("lessons and attempts", ["show", str(experience)], 0, experience / "report.html")
    (where / "sweep.yaml").write_text(json.dumps({name: text}))
    yield Case("a sweep's file", ["sweep", "--out", str(where / "sweep"), str(where / "sweep.yaml")], 2)


@contextmanager
def _server(text: str) -> Iterator[str]:
    """The address of a server that answers every request with an error of this text."""

    class Handler(BaseHTTPRequestHandler):
        """One request."""

        def do_GET(self) -> None:
            """Refuse it."""
            data = json.dumps({"error": {"message": text}}).encode()
            self.send_response(400)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing is printed."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
