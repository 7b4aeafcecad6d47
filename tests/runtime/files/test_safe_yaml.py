"""YAML that stands for more than it seems to ends with one message, in whatever the program reads."""

import pytest
import yaml

from opcd.runtime.errors import UserError
from opcd.runtime.files.safe_yaml import load_yaml
from opcd.sweep.sweep_plan import read_sweep

LAUGHS = "a0: &a0 [1, 2]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
LONG_TEXTS = f"a: &a {'x' * 10**6}\nb: [{', '.join(['*a'] * 1000)}]\n"
BAD = {
    "laughs": (LAUGHS, "aliases stand for more than"),
    "merged": (LAUGHS.replace("[1, 2]", "{b: 1}").replace("[*", "{<<: [*").replace("]\n", "]}\n"), "aliases"),
    "long texts": (LONG_TEXTS, "aliases"),
    "list in itself": ("a: &a [*a]", "holds an alias of itself (line 1)"),
    "mapping in itself": ("a: &a\n  b: *a", "holds an alias of itself"),
    "key in itself": ("&a {? *a : 1}: 2", "holds an alias of itself"),
    "integer": ("seed: " + "9" * 5000, "a number of 5000 characters (line 1)"),
    "hexadecimal": ("seed: 0x" + "f" * 5000, "a number of 5002 characters"),
    "sexagesimal": ("seed: 1" + ":01" * 5000, "a number of 15001 characters"),
    "nesting": ("[" * 100_000, "maximum nesting depth"),
    "deep": ("[" * 200 + "]" * 200, "more than 100 lists and mappings inside of one another"),
    "no date": ("2020-99-99", "month must be in 1..12"),
    "no integer": ("!!int x", "cannot be read"),
    "nothing": ("!!int ''", "cannot be read"),
    "truth": ("!!bool maybe", "cannot be read"),
    "half a pair": ("a: \ud800", "cannot be read"),
    "object": ("!!python/object/apply:os.system [echo]", "could not determine a constructor"),
}


@pytest.mark.case("A11")
@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", BAD)
def test_odd_yaml_is_a_mistake_of_the_users(name):
    text, message = BAD[name]
    with pytest.raises(UserError) as caught:
        load_yaml(text, "file.yaml")
    assert message in str(caught.value) and "file.yaml: not valid YAML" in str(caught.value)


@pytest.mark.case("A11")
def test_plain_yaml_and_some_aliases_are_what_pyyaml_reads():
    text = "a: &a {b: [1, 2.5, x, null, 0x1f, 2020-01-01]}\nc: [*a, *a]\nd: {<<: *a, e: 1}\n"
    assert load_yaml(text, "") == yaml.safe_load(text)
    many = "a: &a {b: 1}\narms: {" + ", ".join(f"x{n}: *a" for n in range(5000)) + "}"
    assert len(load_yaml(many, "")["arms"]) == 5000
    large = "- {a: 1}\n" * 60_000
    assert len(load_yaml(large, "")) == 60_000
    assert load_yaml("", "") is None


@pytest.mark.case("A11")
@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["laughs", "list in itself", "integer", "no date"])
def test_every_command_that_reads_yaml(opcd, tmp_path, name):
    file, run = tmp_path / "odd.yaml", tmp_path / "version_0"
    file.write_text(BAD[name][0])
    run.mkdir()
    (run / "config.yaml").write_text(BAD[name][0])
    (run / "student").mkdir()
    (run / "student" / "config.json").write_text("{}")
    for words in (
        ("fit", "--config", file),
        ("sweep", file),
        ("experience", "--config", file),
        ("evaluate", "--config", file),
        ("export", run, "--to", "hf", "--out", tmp_path / "out"),
        ("report", run, "--out", tmp_path / "page.html"),
    ):
        code, output = opcd(*words)
        assert code == (0 if words[0] == "report" else 2), (words, output)  # a report shows the rest, and names this
        assert len(output) < 2000 and (words[0] != "report" or "not valid YAML" in output), words


@pytest.mark.case("A11")
def test_a_sweep_with_a_key_twice(tmp_path):
    (tmp_path / "sweep.yaml").write_text("axes:\n  a: [1]\n  b: [1]\n  a: [2]\n")
    with pytest.raises(UserError, match="'a' is there twice, again in line 4"):
        read_sweep(tmp_path / "sweep.yaml")
