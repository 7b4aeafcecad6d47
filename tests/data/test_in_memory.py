"""Rows and contexts that are Python objects: read as those of files are."""

import datasets
import pandas
import pytest

from opcd.data import ContextQueryDataModule, Example, read_contexts
from opcd.data.readers import InMemory
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError
from tests.helpers.rows import CONTEXT, ROWS


def refusal(rows, key="data.train"):
    with pytest.raises(UserError) as raised:
        InMemory(rows, key).examples(key)
    return str(raised.value)


@pytest.mark.parametrize(
    "given",
    [
        ROWS,
        tuple(ROWS),
        (row for row in ROWS),
        datasets.Dataset.from_list(ROWS),
        pandas.DataFrame(ROWS).to_dict("records"),
    ],
    ids=["list", "tuple", "generator", "datasets.Dataset", "records of pandas"],
)
def test_they_are_those_of_the_file(tiny, rows, context, given):
    student = ModelConfig(tiny)
    of_files = ContextQueryDataModule(train=str(rows), val=rows, context=str(context), student=student)
    own = ContextQueryDataModule(train=given, val=ROWS[:2], context=[f" {CONTEXT}\n"], student=student)
    for data in (of_files, own):
        data.setup("fit")
        data.setup("validate")
    assert own.fingerprint == of_files.fingerprint and own.context_hash == of_files.context_hash
    found = own.examples("train")
    assert [vars(one) | {"source": ""} for one in found] == [
        vars(one) | {"source": ""} for one in of_files.examples("train")
    ]
    assert found[2].source == "data.train: row 3" and own.examples("val")[1].source == "data.val: row 2"
    one, other = (data.encode(data.examples("train")) for data in (of_files, own))
    assert [prompt.tolist() for prompt in one.teacher_prompts] == [prompt.tolist() for prompt in other.teacher_prompts]
    assert str(own.sources["train"]) == "8 rows in memory"


def test_a_text_is_a_query():
    found = InMemory(["Who?", {"query": "Where?", "reference": 3}], "data.val").examples("data.val")
    assert found == [
        Example("Who?", None, None, None, 0, "data.val: row 1"),
        Example("Where?", None, None, "3", 1, "data.val: row 2"),
    ]


def test_a_message_names_the_row():
    assert refusal(["a", {"prompt": ""}]).startswith("data.train: row 2: prompt is empty")
    assert refusal(["a", 3]).startswith("data.train: row 2: a row must be an object, not int")
    assert refusal([]) == "data.train: no rows"
    with pytest.warns(UserWarning, match=r"data\.val: 1 bad rows skipped .*: data\.val: row 1: "):
        assert len(InMemory([3, "a"], "data.val").examples("data.val", "skip")) == 1


def test_what_is_no_list_of_rows():
    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)})
    assert refusal(splits) == "data.train: a dictionary (train); give a list of rows, or one split of a DatasetDict"
    assert "a table of pandas" in refusal(pandas.DataFrame(ROWS))
    with pytest.raises(UserError, match=r"data\.test: int is no source of rows"):
        ContextQueryDataModule(test=3)


def test_contexts_in_a_list(tmp_path, monkeypatch):
    assert read_contexts([" a b ", "c"]) == ["a b", "c"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(CONTEXT)
    for texts, says in (
        ([], "data.context: the list has no contexts"),
        (["a", " "], r"data.context, context 2: the context \(data.context\) is empty"),
        (["a", 3], "data.context, context 2: a context .* must be text"),
        (["notes.txt"], "data.context: notes.txt is a file, and its text is expected here"),
    ):
        with pytest.raises(UserError, match=says):
            read_contexts(texts)


def test_rows_in_a_recipe(opcd, tiny, tmp_path):
    """A config may hold a few rows and contexts itself; its copy in the run has them too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{train: [{{query: a}}, b], context: ['{CONTEXT}'], batch_size: 2}}\n")
    code, text = opcd(
        *("fit", "--config", recipe, "--model.student.name", tiny, "--trainer.max_steps", 1),
        *("--model.rollout.init_args.sampling.max_new_tokens", 2, "--trainer.default_root_dir", tmp_path),
        *("--trainer.enable_checkpointing", "false"),
    )
    assert code == 0, text
    assert "- query: a\n  - b\n" in (tmp_path / "version_0" / "config.yaml").read_text()
