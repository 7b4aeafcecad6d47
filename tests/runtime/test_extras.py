"""The name that pip knows the project by, and the command that installs an extra."""

import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from opcd.runtime import extras
from opcd.runtime.errors import UserError
from opcd.runtime.versions import VERSION, installed_version
from tests.helpers.paths import ROOT

SOMEBODY_ELSES = re.compile(r"(?<![\w./-])opcd\[|pip3? install [^\n|&;]*?(?<![\w./-])opcd(?![\w./-])")
"""What would install the project that is called `opcd` on PyPI."""


def words(hint: str) -> list[str]:
    """What pip is given, as a shell splits it."""
    return shlex.split(hint)[shlex.split(hint).index("install") + 1 :]


def test_a_clone_and_a_wheel_have_their_own_command(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert words(extras.install_hint("adapters")) == ["-e", ".[adapters]"]
    monkeypatch.chdir(tmp_path)
    assert words(extras.install_hint("adapters")) == ["-e", f"{ROOT}[adapters]"]
    (tmp_path / "it's a clone").mkdir()
    (tmp_path / "it's a clone" / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "ROOT", tmp_path / "it's a clone")
    assert words(extras.install_hint("plots")) == ["-e", f"{tmp_path}/it's a clone[plots]"]
    monkeypatch.setattr(extras, "ROOT", tmp_path / "site-packages")
    assert words(extras.install_hint("adapters")) == ["opcd-lightning[adapters]"]


def test_the_pip_is_that_of_this_environment(monkeypatch, tmp_path):
    own = Path(sys.executable).parent / "pip"
    monkeypatch.setattr(extras.shutil, "which", lambda _: str(own))
    assert extras.install_hint("plots").startswith("pip install ")
    monkeypatch.setattr(extras.shutil, "which", lambda _: "/usr/bin/pip")
    assert shlex.split(extras.install_hint("plots"))[:3] == [sys.executable, "-m", "pip"]


def test_a_missing_module_is_named_with_the_key_and_the_command():
    extras.require("adapters", "json", "model.adapter")
    with pytest.raises(UserError) as refused:
        extras.require("adapters", "nobodys_library", "model.adapter")
    assert str(refused.value) == (
        f"model.adapter needs nobodys_library, which is not installed: {extras.install_hint('adapters')}"
    )


def test_the_project_is_called_so_and_every_extra_that_is_asked_for_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["name"] == extras.DISTRIBUTION and "version" in project["dynamic"]
    asked = re.compile(r"(?:require|install_hint)\(\s*[\"'](\w+)[\"']")
    used = {name for file in (ROOT / "opcd").rglob("*.py") for name in asked.findall(file.read_text(encoding="utf-8"))}
    assert used and used <= set(project["optional-dependencies"])
    assert installed_version("opcd") == VERSION and installed_version("nobodys") is None
    assert re.fullmatch(r"\d+\.\d+\.\d+", VERSION)


def test_nothing_tells_people_to_install_somebody_elses_package():
    assert SOMEBODY_ELSES.search("pip install 'opcd[plots]'") and SOMEBODY_ELSES.search("pip install -U opcd")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    found = []
    for name in filter(None, listed.split("\0")):
        if name in ("CHANGELOG.md", "tests/runtime/test_extras.py"):  # they speak of it
            continue
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace") if (ROOT / name).is_file() else ""
        found += [f"{name}: {hit[0]}" for hit in SOMEBODY_ELSES.finditer(text)]
    assert found == []
