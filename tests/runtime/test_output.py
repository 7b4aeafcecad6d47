"""What leaves for people: escaped, masked, and no reason for a run to end."""

import errno
import io
import json
import os
import subprocess
import sys
import time
import unicodedata

import pytest
from rich.console import Console
from rich.live import Live
from rich.table import Table

from opcd.cli import main as cli
from opcd.runtime import output
from opcd.runtime.output import CONTROL, Screen, clean_output, finish_output, hide, masked, plain, shown
from tests.helpers.paths import ROOT
from tests.helpers.rows import write_rows

CLIPBOARD, CLEAR, CONCEAL = "\x1b]52;c;ZXZpbA==\x07", "\x1b[2J", "\x1b[8m"
ATTACK = f"a{CLIPBOARD}b{CLEAR}c\x9b2Jd\u202ee\u2066f\rg\bh\x7f"


@pytest.fixture(autouse=True)
def no_secrets(monkeypatch):
    monkeypatch.setattr(output, "_secrets", frozenset())


@pytest.mark.case("A7")
def test_control_characters_are_shown_escaped():
    assert shown(ATTACK) == (r"a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9b2Jd\u202ee\u2066f\rg\x08h\x7f")
    assert shown("two\r\nlines\n\tand é 漢字 👩‍🔬 می‌خواهم") == "two\nlines\n\tand é 漢字 👩‍🔬 می‌خواهم"
    assert shown("a\nb\tc", lines=False) == r"a\nb\tc"
    assert shown("x\udcff\U000e0041") == r"x\udcff\U000e0041"
    assert shown(shown(ATTACK)) == shown(ATTACK)


@pytest.mark.case("A7")
def test_every_control_character_of_unicode_is_escaped():
    allowed = {"\n", "\t"}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        kind, direction = unicodedata.category(character), unicodedata.bidirectional(character)
        if kind in ("Cc", "Cs", "Zl", "Zp") or direction in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        ):
            assert (CONTROL.search(character) is None) == (character in allowed), hex(code)


@pytest.mark.case("E8", "B9")
@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://user:pass@hub.example/x", "https://***@hub.example/x"),
        ("https://user@hub.example", "https://***@hub.example"),
        ("https://u:p@ss@hub.example", "https://***@hub.example"),
        ("https://u:pa/ss@hub.example", "https://***@hub.example"),
        ("'http://u:p@a' and (http://v:q@b)", "'http://***@a' and (http://***@b)"),
        ("http://localhost:8000/v1/x@y", "http://localhost:8000/v1/x@y"),
        ("https://hub.example/org/name@main", "https://hub.example/org/name@main"),
        ("https://h/x?a=b&token=s3cret&c=d", "https://h/x?a=b&token=***&c=d"),
        ("a@b.example, the bearer of news", "a@b.example, the bearer of news"),
    ],
)
def test_passwords_in_addresses_are_masked(text, clean):
    assert masked(text) == clean


@pytest.mark.case("B9")
def test_a_secret_is_masked_however_it_is_quoted():
    key = 'k"ey\\with%20odd'
    hide(key)
    for said in (key, json.dumps(key), repr(key), 'k"ey\\with odd'):
        assert "odd" not in masked(said) and "***" in masked(said)


@pytest.mark.case("E8")
def test_keys_of_the_environment_are_masked(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", "https://me:correct-horse@hub.example")
    monkeypatch.setenv("SOME_API_KEY", "sk-planted-31")
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id")
    with clean_output():
        print("correct-horse", "sk-planted-31", "/home/me/.ssh/id")
        print("https://me:correct-horse@hub.example", file=sys.stderr)
    assert capsys.readouterr() == ("*** *** /home/me/.ssh/id\n", "https://***@hub.example\n")


@pytest.mark.case("A7", "B8")
def test_cleaning_takes_linear_time():
    begun = time.monotonic()
    for text in ("://" * 50_000, "://a:" * 30_000, "https://" + "a:" * 100_000, "?token=" * 30_000, "\x1b" * 200_000):
        shown(text)
    assert time.monotonic() - begun < 20


class Terminal(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self):
        return True


@pytest.mark.case("A7")
def test_streams_clean_and_keep_what_progress_bars_need(monkeypatch):
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with clean_output():
        print(ATTACK)
        for piece in ("\r 10%|x\x1b[2J", "\r     \r", "\x1b[A\x1b[A", "a\rb\n"):
            sys.stderr.write(piece)
        Console(file=None, force_terminal=True, color_system="standard", width=40).print("[red]red[/]")  # another's
    assert sys.stdout is out and sys.stderr is err
    assert out.getvalue() == shown(ATTACK) + "\n\x1b[31mred\x1b[0m\n"
    assert err.getvalue() == "\r 10%|x\\x1b[2J\r     \r\x1b[A\x1b[Aa\\rb\n"


@pytest.mark.case("A7")
def test_a_screen_keeps_its_colours_and_cleans_the_text():
    file = io.StringIO()
    screen = Screen(file=file, force_terminal=True, color_system="standard", width=70)
    table = Table("[bold]x[/]")
    table.add_column(plain(f"[red]{CLEAR}"))
    table.add_row(CLIPBOARD, plain(f":smile: [/bold]{CONCEAL}"))
    screen.print(table)
    screen.print(f"[green]{CLEAR}[/]", highlight=False)
    text = file.getvalue()
    assert "\x1b[32m\\x1b" in text and "\x1b[1" in text
    assert not any(attack in text for attack in (CLEAR, CLIPBOARD, CONCEAL))
    for piece in (r"[red]\x1b[2J", r"\x1b]52;c;ZXZpbA==\x07", r":smile: [/bold]\x1b[8m"):
        assert piece in text.replace("\x1b[1m", "").replace("\x1b[0m", "")


@pytest.mark.case("A7", "C2")
def test_what_is_printed_while_a_screen_draws_stands_above_it_cleaned(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with clean_output():
        with Live("drawn", console=Screen(width=40, force_terminal=True), auto_refresh=False):
            print(f"said{CONCEAL}{CLEAR}", end="")
            print(" on", file=sys.stdout)
        print("after")
    text = out.getvalue()
    assert r"said\x1b[8m\x1b[2J on" + "\n" in text and text.endswith("after\n")
    assert CONCEAL not in text and CLEAR not in text
    assert text.index("said") < text.rindex("drawn")


@pytest.mark.case("B3", "D9")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_what_an_encoding_lacks_is_escaped(monkeypatch, encoding):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with clean_output():
        print("漢字 é ✓ x\udcff")
        table = Table("x")
        table.add_row(plain("✓ 漢字"))
        Screen(width=40).print(table)
    text = raw.getvalue().decode(encoding)
    assert r"\u6f22\u5b57" in text and r"x\udcff" in text and r"\u2713" in text


@pytest.mark.case("B3", "D9")
def test_a_fit_whose_output_is_ascii_writes_its_student(tiny, tmp_path, context, monkeypatch):
    rows = write_rows(
        tmp_path / "r.jsonl", [{"query": f"港務長{CLEAR} {n}?", "reference": "オダリス"} for n in range(2)]
    )
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    words = f"fit --data.train {rows} --data.context {context} --data.batch_size 2 --trainer.max_steps 1"
    more = f"--model.student.name {tiny} --trainer.default_root_dir {tmp_path / 'runs'} --trainer.accelerator cpu"
    assert cli.main([*words.split(), *more.split(), "--trainer.precision", "32-true"]) == 0
    assert (tmp_path / "runs/version_0/student/model.safetensors").exists()
    text = raw.getvalue().decode("ascii")
    assert r"\u6e2f\u52d9\u9577" in text and "\x1b" not in text and r"\x1b" in text


class Broken(io.StringIO):
    """A stream that fails."""

    def __init__(self, number):
        super().__init__()
        self.number, self.tries = number, 0

    def write(self, text):
        self.tries += 1
        raise OSError(self.number, os.strerror(self.number))


@pytest.mark.case("B3")
@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO, errno.EBADF])
def test_output_that_fails_ends_nothing(monkeypatch, number):
    out, err = Broken(number), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with clean_output():
        for _ in range(3):
            print("x")
        Screen().print("y")
        complete = finish_output()
    assert out.tries == 1
    assert complete == (number == errno.EPIPE)
    assert ("cannot be written" in err.getvalue()) != complete


@pytest.mark.case("B3")
def test_standard_error_that_fails_or_is_closed_ends_nothing(monkeypatch, capsys):
    closed = io.StringIO()
    closed.close()
    for stream in (Broken(errno.ENOSPC), closed, None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert cli.main(["nothing"]) == 2
    assert cli.main(["--version"]) == 0


@pytest.mark.case("B3")
@pytest.mark.parametrize(
    ("redirections", "code"),
    [("| head -c 1", 0), (">&-", 0), (">/dev/full", 1), (">&- 2>&- <&-", 0), ("2>/dev/full", 0)],
)
def test_a_command_whose_reader_is_gone(redirections, code):
    """In a shell: what Python itself does with its streams at its end is part of it."""
    line = f"{sys.executable} -m opcd --help {redirections}"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == code
    told = "opcd: standard output cannot be written: [Errno 28] No space left on device\n"
    assert done.stderr == (told if code else "")


@pytest.mark.case("A7")
def test_an_error_message_shows_a_folders_name_escaped(opcd, tmp_path):
    code, text = opcd("report", tmp_path / f"run{CLIPBOARD}\u202e")
    assert code == 2 and r"run\x1b]52;c;ZXZpbA==\x07\u202e" in text
    assert not CONTROL.search(text)


@pytest.mark.case("A7")
def test_doctor_shows_the_names_of_folders_escaped(opcd, tmp_path, monkeypatch):
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    (cache / f"models--org--evil{CLEAR}\n  ok   forged").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "ENDPOINT", "https://me:pw@hub.invalid")
    _, text = opcd("doctor")
    assert r"org/evil\x1b[2J\n  ok   forged" in text and not CONTROL.search(text)
    assert "https://***@hub.invalid" in text and "me:pw" not in text


@pytest.mark.case("A7")
def test_only_one_module_makes_consoles():
    """Whoever draws takes a `Screen`."""
    makers = [str(file.relative_to(ROOT)) for file in (ROOT / "opcd").rglob("*.py") if " Console(" in file.read_text()]
    assert makers == []
