"""The model card: what it says is text, whoever wrote it."""

import json
from dataclasses import replace

import pytest
import yaml

from opcd.models.model_card import FACTS, Facts, model_card

EVIL = "<script>x</script> `a` | b\n| c | d |\n# h [l](javascript:x) *e* \x1b[2J\u202e --- !"
FACTS_OF_A_RUN = Facts(base="org/name", teacher={"FrozenTeacher": None}, loss="JSD(beta=0.5, top_k=3)", steps=3)


def rows(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith("|")]


@pytest.mark.case("A8")
@pytest.mark.parametrize("name", ["base", "context", "context_sha256", "data", "loss", "reduction", "rollout", "opcd"])
def test_a_fact_of_any_text_stays_in_its_cell(name):
    card = model_card(replace(FACTS_OF_A_RUN, **{name: EVIL}))
    plain = model_card(replace(FACTS_OF_A_RUN, **{name: "harmless"}))
    assert len(card.splitlines()) == len(plain.splitlines())
    assert not any(piece in card for piece in ("<script>", "\x1b", "\u202e", "\n# h"))
    (row,) = [row for row in rows(card) if "script" in row]
    assert row.replace("\\|", "").count("|") == 3
    assert r"&lt;script&gt;x&lt;/script&gt; \`a\` \| b \| c \| d \| \# h \[l\]" in row and r"\\x1b\[2J\\u202e" in row


@pytest.mark.case("A8")
def test_teachers_and_commands_of_any_text():
    command = "opcd fit --x '`` ` <b> | \n| y |\x1b'"
    card = model_card(replace(FACTS_OF_A_RUN, teacher={EVIL: EVIL}), command=command)
    found = {row.split(" | ")[0].strip("| "): row for row in rows(card)}
    assert found["command"] == "| command | ```opcd fit --x '`` ` <b> \\| \\n\\| y \\|\\x1b'``` |"
    assert "<script>" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/name"
    assert (
        model_card(replace(FACTS_OF_A_RUN, base="org/name\nlicense: mit")).count("license: mit") <= 2
    )  # title and cell
    assert "base_model" not in model_card(replace(FACTS_OF_A_RUN, base="org/name\nlicense: mit")).split("---")[1]


def test_plain_facts_are_as_they_are():
    card = model_card(FACTS_OF_A_RUN, command="opcd fit --config a_b.yaml")
    assert "| loss | JSD(beta=0.5, top_k=3) |" in card and "| base | org/name |" in card
    assert "| command | `opcd fit --config a_b.yaml` |" in card and "# org/name with a context" in card


@pytest.mark.case("A8", "A9")
@pytest.mark.parametrize(
    "wrong",
    [
        {"base": 3},
        {"base": None},
        {"teacher": ["x"]},
        {"teacher": {"x": 3}},
        {"steps": "3"},
        {"loss": ["x"]},
        {"data": {}},
        {"unknown": 1},
    ],
)
def test_facts_of_other_types_are_none(tmp_path, wrong):
    (tmp_path / FACTS).write_text(json.dumps({"base": "org/name"} | wrong))
    assert Facts.read(tmp_path) is None
    (tmp_path / FACTS).write_text(
        json.dumps({"base": "org/name", "teacher": {"T": None}, "steps": 3, "temperature": 1.0})
    )
    assert Facts.read(tmp_path).steps == 3
