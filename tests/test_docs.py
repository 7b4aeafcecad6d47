"""What README, docs/, configs/ and examples/ show: their Python runs, and the words of their commands are known."""

import argparse
import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jsonargparse
import pytest
import torch

import opcd.losses
from opcd.cli import TRAINER
from opcd.cli.fit import fit_parser
from opcd.cli.main import main
from opcd.models import gguf_folder as gguf
from tests.helpers.paths import ROOT

PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORTER = {"max_steps=10": "max_steps=1"}
N, V, H_S, H_T, K = 6, 48, 8, 12, 20


def python_pages() -> list[Path]:
    """Pages with Python."""
    return [page for page in PAGES if any(block[1] == "python" for block in FENCED.finditer(page.read_text()))]


def named_files() -> Iterator[tuple[str, str]]:
    """Blocks of Python that are a file of their own, whose first line names it."""
    for page in PAGES:
        for block in FENCED.finditer(page.read_text()):
            if found := re.match(r"# (\w+\.py)\b", block[2]):
                yield found[1], block[2]


def given() -> dict[str, object]:
    """What the blocks speak of without making it: two models' logits, states, heads, and records."""
    torch.manual_seed(0)
    states = {"student_hidden": torch.randn(N, H_S, requires_grad=True), "student_head": torch.randn(V, H_S)}
    states |= {"teacher_hidden": torch.randn(N, H_T), "teacher_head": torch.randn(V, H_T)}
    log_probs, tokens = torch.randn(N, V).log_softmax(-1).topk(K)
    return (
        {name: getattr(opcd.losses, name) for name in opcd.losses.__all__}
        | states
        | {"states": tuple(states.values()), "mask": torch.arange(N) % 3 > 0, "lengths": torch.tensor([2, 4])}
        | {"student_logits": torch.randn(N, V, requires_grad=True), "teacher_logits": torch.randn(N, V)}
        | {"tokens": tokens, "log_probs": log_probs, "token": tokens[:, 0], "log_prob": log_probs[:, 0]}
        | {name: SimpleNamespace(lm_head=states[f"{name}_head"]) for name in ("student", "teacher")}
    )


@pytest.fixture
def here(monkeypatch, tmp_path, tiny):
    """A folder like the repository's root after a run, where the packaged model is a tiny one."""
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file in (ROOT / "opcd" / "cli" / "starter" / "facts").iterdir():  # as `opcd init` writes them
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "runs" / "version_0").mkdir(parents=True)
    (tmp_path / "runs" / "version_0" / "student").symlink_to(tiny)
    (tmp_path / "student").symlink_to(tiny)  # as `opcd export --out student` writes it
    for name, block in named_files():
        (tmp_path / name).write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf, "converted", lambda *_: tiny)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, of defaults that the page takes
@pytest.mark.parametrize("page", python_pages(), ids=lambda page: page.name)
def test_the_python_of_a_page_runs(here, page):
    names = given()
    text = page.read_text(encoding="utf-8")
    for block in FENCED.finditer(text):
        if block[1] == "python":
            code = "\n" * (text.count("\n", 0, block.start()) + 1) + block[2]
            for long, short in SHORTER.items():
                code = code.replace(long, short)
            exec(compile(code, str(page), "exec"), names)


def shown() -> Iterator[tuple[str, str]]:
    """(where, text) of what shows commands: pages, the comments of recipes, the first docstring of an example."""
    for page in PAGES:
        yield page.name, page.read_text(encoding="utf-8")
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        yield recipe.name, re.sub(r"^# ?", "", recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for example in sorted((ROOT / "examples").glob("*.py")):
        yield example.name, str(ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")), clean=False))


def commands() -> dict[str, str]:
    """Every command in a block, fenced or indented, less its first word opcd -> where it stands first."""
    found: dict[str, str] = {}
    for where, text in shown():
        text = text.replace("\\\n", " ")
        fenced = "\n".join(block[2] for block in FENCED.finditer(text) if block[1] in ("", "sh", "bash", "console"))
        indented = "\n".join(re.findall(r"^ {4}(.*)$", FENCED.sub("", text), re.MULTILINE))
        for line in re.findall(r"^(?:python -m )?opcd ([a-z].*)$", f"{fenced}\n{indented}", re.MULTILINE):
            found.setdefault(shlex.join(shlex.split(line.split(" > ")[0], comments=True)), where)
    return found


def words_of(command: str) -> list[str]:
    """The words, of which a file YOURS.yaml is made where there is none."""
    words = shlex.split(command)
    for word in words:
        if re.fullmatch(r"[A-Z_]+\.yaml", word):
            Path(word).write_text("{}")
    return words


PARSER = cache(fit_parser)
"""One for all: it takes seconds to build."""


class Parsed(BaseException):
    """The words were understood."""


@pytest.fixture
def only_parse(monkeypatch):
    """Commands stop when they have parsed their words."""
    for kind in (argparse.ArgumentParser, jsonargparse.ArgumentParser):

        def parse(self, *args, original=kind.parse_args, **options):
            original(self, *args, **options)
            raise Parsed

        monkeypatch.setattr(kind, "parse_args", parse)

    def read(*_: object) -> None:
        raise Parsed

    monkeypatch.setattr("opcd.cli.sweep.read_sweep", read)
    monkeypatch.setattr("opcd.cli.record.fit_parser", PARSER)
    monkeypatch.setattr("opcd.cli.record.checked", lambda _, words: words)  # it reads the rows of a recipe


LIGHTNINGS = [command for command in commands() if command.split()[0] in TRAINER]
OTHERS = [command for command in commands() if command.split()[0] not in TRAINER]


@pytest.mark.parametrize("command", LIGHTNINGS)
def test_lightnings_commands_are_known(here, command):
    assert PARSER().parse_args(words_of(command)[1:]), commands()[command]


@pytest.mark.parametrize("command", OTHERS)
def test_the_other_commands_are_known(here, only_parse, command):
    with pytest.raises(Parsed):
        assert main(words_of(command)) == 0, commands()[command]


LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)|!\[[^\]]*\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for target, anchor, picture in LINK.findall(FENCED.sub("", page.read_text(encoding="utf-8"))):
        file = page if not (target or picture) else (page.parent / (target or picture)).resolve()
        assert file.exists(), f"{page.name}: {target or picture}"
        assert not anchor or file.is_relative_to(ROOT / "docs/api") or anchor in anchors(file), (
            f"{page.name}: #{anchor}"
        )


def test_the_config_keys_are_those_of_the_parser(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import make_keys

    shown = (ROOT / "docs/keys.md").read_text(encoding="utf-8")
    assert make_keys.page() == shown, "run python docs/make_keys.py"
    assert "| `model.temperature` | `1.0` | divides the logits of both models" in shown
    assert "### ReverseKL" in shown and "### StudentRollout" in shown and "required" in shown


def test_there_are_commands_and_blocks_of_python_at_all():
    assert len(LIGHTNINGS) > 15 and len(OTHERS) > 15 and len(python_pages()) >= 2
