"""`opcd chat`: who is asked what, how answers are shown, and how a chat ends."""

import fcntl
import io
import itertools
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
import yaml
from rich.console import Console

from opcd.chat import chat_models as speakers
from opcd.chat.chat_models import Origin, Source, Speaker
from opcd.chat.display import NARROW, show_answers
from opcd.cli import chat as command
from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules.lm.generation import Sampling
from opcd.runtime.errors import UserError
from tests.helpers.paths import ROOT
from tests.helpers.rows import CONTEXT, write_rows

GREEDY = Sampling(max_new_tokens=6, temperature=0.0)
QUESTION = "What is 1 + 1?"


@pytest.fixture
def typed(monkeypatch):
    """Lines of a pipe."""
    return lambda text: monkeypatch.setattr(sys, "stdin", io.StringIO(text))


@pytest.fixture(scope="module")
def source(tiny):
    made = Source(ModelConfig(tiny), "MODEL")
    made.load(torch.device("cpu"))
    return made


@pytest.fixture
def run(tiny, tmp_path):
    """A run's folder with a tiny student, whose context stood before the query."""
    folder = tmp_path / "runs" / "version_3"
    shutil.copytree(tiny, folder / "student")
    data = {"placement": "user", "template": "{query} Know: {context}"}
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"student": {"name": tiny}}, "data": data}))
    return folder


@pytest.mark.parametrize("placement", [("system", None), ("user", "{query}\n\nKnow: {context}"), ("raw", None)])
def test_prompts_are_the_views_of_training(source, tiny, tmp_path, context, monkeypatch, placement):
    queries = [QUESTION, "What does <|im_end|> mean?"]
    rows = write_rows(tmp_path / "chat.jsonl", [{"query": query} for query in queries])
    data = ContextQueryDataModule(
        train=str(rows),
        context=str(context),
        placement=placement[0],
        template=placement[1],
        student=ModelConfig(tiny),
    )
    data.setup("fit")
    batch = data.encode(data.examples("train"))
    asked = []
    respond = speakers.respond
    monkeypatch.setattr(speakers, "respond", lambda *args: asked.append(torch.tensor(args[2][0])) or respond(*args))
    for views, given in ((batch.teacher_prompts, CONTEXT), (batch.student_prompts, None)):
        asked.clear()
        speaker = Speaker("it", source, given, *placement)
        for query in queries:
            speaker.answer(query, GREEDY, lambda text: None)
        assert all(torch.equal(a, b) for a, b in zip(asked, views, strict=True))


def test_piped_questions_and_plain_answers(opcd, typed, tiny, tiny_teacher, context):
    typed(f"{QUESTION}\n\n  What is 2 + 2? \n/quit\nnever asked\n")
    words = ("--context", context, "--beside", tiny_teacher, "--max_new_tokens", 6)
    code, text = opcd("chat", tiny, *words)
    assert code == 0 and "\x1b" not in text
    sources = {name: Source(ModelConfig(name), "MODEL") for name in (tiny_teacher, tiny)}
    who = [(tiny_teacher, None), (f"{tiny_teacher} with the context", CONTEXT), (tiny, None)]
    expected = ""
    for query in (QUESTION, "What is 2 + 2?"):
        expected += f"> {query}\n"
        for title, given in who:
            one = sources[title.removesuffix(" with the context")]
            one.load(torch.device("cpu"))
            expected += (
                f"[{title}]\n{Speaker(title, one, given, 'system', None).answer(query, GREEDY, print_nothing)}\n\n"
            )
    assert text == expected


def print_nothing(text: str) -> None:
    """Where only the whole answer counts."""


def test_answers_are_shown_while_they_are_written(source):
    seen = []
    whole = Speaker("it", source, None, "system", None).answer(QUESTION, Sampling(24, 0.0), seen.append)
    assert len(seen) > 3 and seen[-1] == whole.rstrip("\N{REPLACEMENT CHARACTER}")
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize(("width", "beside"), [(NARROW, True), (NARROW - 1, False)])
def test_narrow_terminals_show_one_below_the_other(source, width, beside):
    pair = [Speaker(title, source, given, "system", None) for title, given in (("left", None), ("right", CONTEXT))]
    answers = [speaker.answer(QUESTION, GREEDY, print_nothing) for speaker in pair]
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    show_answers(console, pair, QUESTION, GREEDY)
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue()).splitlines()
    heads = [line for line in lines if "left" in line]
    assert all(("right" in line) == beside for line in heads) and heads
    assert max(map(len, lines)) <= width or not beside
    assert beside or any(answers[0] and answers[0].splitlines()[0] in line for line in lines)


def test_a_run_is_its_student_made_from_what_it_was_and_asked_as_in_training(run, tiny):
    for name in (run, run / "student"):
        origin = Origin.of(str(name))
        assert origin.config.name == str(run / "student") and origin.base == ModelConfig(tiny)
        assert origin.data["template"] == "{query} Know: {context}"
    assert Origin.of(tiny) == Origin(ModelConfig(tiny), None, {})


def test_a_chat_with_a_run_puts_its_base_beside_it(opcd, typed, run, tiny, context, monkeypatch):
    asked = []
    respond = speakers.respond
    monkeypatch.setattr(speakers, "respond", lambda *args: asked.append(args) or respond(*args))
    typed(QUESTION + "\n")
    code, text = opcd("chat", run, "--context", context, "--max_new_tokens", 3)
    assert code == 0, text
    assert re.findall(r"^\[(.*)\]$", text, re.M)[:3] == [tiny, f"{tiny} with the context", str(run)]
    student, _, prompts, *_ = asked[1]
    assert f"{QUESTION} Know: {CONTEXT}" in student.tokenizer.decode(prompts[0])
    assert asked[0][0] is student and asked[2][0] is not student  # one copy of the weights before, and one after


def test_an_unfinished_run_names_the_students_that_it_has(run):
    (run / "student").rename(run / "student-step=20")
    with pytest.raises(UserError, match="has no student; it has student-step=20: name one"):
        Origin.of(str(run))
    assert Origin.of(str(run / "student-step=20")).config.name == str(run / "student-step=20")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--context", "nowhere.txt"), "--context: no file"),
        (("--beside", "smolm2"), "--beside.name: no model 'smolm2'"),
        (("--placement", "user"), "--placement has no effect without --context"),
        (("--template", "{context}{query}"), "--template has no effect without --context"),
        (("--max_new_tokens", "0"), "max_new_tokens must be at least 1"),
        (("--top_p", "0.9"), "top_k and top_p have no effect at temperature 0"),
        (("--max_new_tokens", "1000"), "takes 512 tokens, and prompt and answer may have"),
        (("--device", "abacus"), "device: abacus"),
    ],
)
def test_user_mistakes(opcd, typed, tiny, words, message):
    typed(QUESTION + "\n")
    code, text = opcd("chat", tiny, *words)
    assert code == 2 and message in text


def test_a_mistake_at_the_prompt_does_not_end_the_chat(monkeypatch, tiny, capsys):
    lines = iter(["What is " + "very " * 600 + "long?", QUESTION])

    def typed(prompt: str) -> str:
        if (line := next(lines, None)) is None:
            raise EOFError  # Ctrl-D
        return line

    monkeypatch.setattr("builtins.input", typed)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    assert command.main([tiny, "--max_new_tokens", "3"]) == 0
    captured = capsys.readouterr()
    assert "ask in fewer words" in captured.err and f"[{tiny}]" in captured.out


@pytest.fixture
def at_a_terminal(monkeypatch):
    """Type these lines at a prompt, then Ctrl-D; what each model was asked, as text."""

    def run(lines: list[str], *words: object) -> list[str]:
        left, asked = iter(lines), []

        def typed(prompt: str) -> str:
            if (line := next(left, None)) is None:
                raise EOFError
            return line

        respond = speakers.respond

        def listening(student, views, prompts, *rest):
            asked.append(student.tokenizer.decode(prompts[0]))
            return respond(student, views, prompts, *rest)

        monkeypatch.setattr(speakers, "respond", listening)
        monkeypatch.setattr("builtins.input", typed)
        for stream in (sys.stdin, sys.stdout):
            monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
        assert command.main([*map(str, words), "--max_new_tokens", "3"]) == 0
        return asked

    return run


@pytest.mark.case("C22")
def test_a_chat_has_a_banner_commands_and_turns(at_a_terminal, tiny, context, capsys):
    lines = ["My name is Ada.", "What is my name?", "/help", "/hepl", "/reset", "And now?", "/quit", "never asked"]
    asked = at_a_terminal(lines, tiny, "--context", context)
    with_context, alone = asked[0::2], asked[1::2]
    assert len(with_context) == len(alone) == 3
    for prompts in (with_context, alone):
        assert ["My name is Ada." in prompt for prompt in prompts] == [True, True, False]
        assert "What is my name?" in prompts[1] and "What is my name?" not in prompts[2]
        assert prompts[1].count("<|im_start|>assistant") == 2  # its own answer stands between the two
    assert all(CONTEXT in prompt for prompt in with_context) and not any(CONTEXT in prompt for prompt in alone)
    captured = capsys.readouterr()
    banner, *rest = captured.out.splitlines()
    assert banner == f"opcd chat: each question goes to {tiny} with the context, then to {tiny}"
    assert "/help lists the commands, /quit ends" in rest[0]
    assert all(f"\n{name}" in captured.out for name in ("/help ", "/reset", "/quit"))
    assert "no command /hepl; did you mean /help?" in captured.err
    assert "The conversation is forgotten." in captured.out


@pytest.mark.case("C22")
def test_a_question_that_one_model_cannot_take_is_no_turn_of_any(at_a_terminal, tiny, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 440)
    asked = at_a_terminal(["Short?", "Longer " + "and longer " * 20 + "?", "Again?"], tiny, "--beside", tiny)
    assert len(asked) == 6
    asked = at_a_terminal(["Longer " + "and longer " * 40 + "?", "Again?"], tiny, "--context", long)
    assert all("Longer" not in prompt for prompt in asked if "Again?" in prompt)


@pytest.mark.case("C22")
def test_without_a_chat_template_every_question_stands_alone(at_a_terminal, tiny, context, capsys):
    asked = at_a_terminal(["One?", "Two?"], tiny, "--context", context, "--placement", "raw")
    assert not any("One?" in prompt for prompt in asked[2:])
    assert "each question is asked on its own" in capsys.readouterr().out


@pytest.mark.case("C22")
def test_questions_from_a_pipe_stand_alone(opcd, typed, tiny, monkeypatch):
    asked = []
    respond = speakers.respond
    monkeypatch.setattr(speakers, "respond", lambda *args: asked.append(args[2][0]) or respond(*args))
    typed("One?\n/help\n")
    code, _ = opcd("chat", tiny, "--max_new_tokens", 2)
    tokenizer = Source(ModelConfig(tiny), "MODEL").tokenizer
    assert code == 0 and "One?" not in tokenizer.decode(asked[1]) and "/help" in tokenizer.decode(asked[1])


@pytest.mark.case("C22")
def test_thoughts_are_not_remembered():
    assert speakers.THOUGHT.sub("", "<think>\nhm\n</think>\n\nYes.") == "Yes."


def test_ctrl_c_ends_with_130_and_no_traceback(tiny):
    """Twice at most: on a busy machine one interrupt once led to nothing, and the cause was not found."""
    assert any(ends_by_ctrl_c(tiny) for _ in range(2))


def ends_by_ctrl_c(tiny: str) -> bool:
    """One interrupt, on a terminal of its own, in the middle of an answer; whether the chat ends, which is checked."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    words = [sys.executable, "-m", "opcd", "chat", tiny, "--beside", tiny, "--max_new_tokens", "450"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm"}
    chat = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
    os.close(theirs)
    said = b""

    def wait_for(text: bytes) -> None:
        nonlocal said
        begun = time.monotonic()
        while text not in said:
            assert time.monotonic() - begun < 60, said
            said += os.read(ours, 4096)

    wait_for(b"> ")
    os.write(ours, f"{QUESTION}\n".encode())
    wait_for("━".encode())
    time.sleep(0.1)
    chat.send_signal(signal.SIGINT)
    try:
        while select.select([ours], [], [], 20)[0]:
            said += os.read(ours, 4096)
        chat.kill()
    except OSError:  # its terminal is gone
        pass
    os.close(ours)
    if (code := chat.wait(30)) == -signal.SIGKILL:
        return False
    assert code == 130
    screen, cursor, last = said.rpartition(b"\x1b[?25h")  # the cursor is there again
    assert cursor and b"Traceback" not in screen and last.startswith(b"opcd: SIGINT: ") and last.count(b"\n") == 1
    return True


@pytest.mark.case("A1")
@pytest.mark.parametrize("asked", ["trust_remote_code", "pickled_weights"])
def test_a_run_that_asks_to_run_code_is_refused_until_the_command_line_allows_it(opcd, typed, run, tiny, asked):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["student"][asked] = True
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    typed(QUESTION + "\n")
    code, text = opcd("chat", run, "--max_new_tokens", 1)
    assert code == 2 and f"give --{asked}" in text and text.count("\n") == 1
    assert not getattr(Origin.of(tiny).config, asked)
    origin = Origin.of(str(run), **{asked: True})
    assert getattr(origin.config, asked) and getattr(origin.base, asked)


@pytest.mark.case("A1")
@pytest.mark.parametrize(
    ("field", "value"),
    [("attention", "org/kernel"), ("dtype", "load"), ("trust_remote_code", "yes"), ("name", []), ("other", 1)],
)
def test_settings_of_a_run_that_no_model_has(opcd, typed, run, field, value):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"]["student"][field] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    typed(QUESTION + "\n")
    code, text = opcd("chat", run, "--max_new_tokens", 1)
    assert code == 2 and "config.yaml" in text and "Traceback" not in text
