"""Anchors: their share over epochs and ranks, their prompts, going on, and what is refused."""

import json
from fractions import Fraction
from itertools import chain
from math import floor

import pytest

from opcd.callbacks.recovery_and_drift import GENERAL
from opcd.data import ContextQueryDataModule
from opcd.data.anchors import PROMPTS, AnchoredSampler, Anchors
from opcd.models import ModelConfig
from opcd.runtime.errors import UserError
from tests.helpers.rows import read_rows


@pytest.fixture
def files(tmp_path, write_rows, monkeypatch, tiny):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(tiny)
    write_rows(*({"query": f"What is {n} + {n}?"} for n in range(10)), name="train.jsonl")
    (tmp_path / "contexts.json").write_text(json.dumps(["Be kind.", "Answer in French."]))
    return tmp_path


def module(share=0.3, source=None, stage="fit", **arguments):
    options = {"train": "train.jsonl", "context": "contexts.json", "batch_size": 4} | arguments
    data = ContextQueryDataModule(**options, anchors=Anchors(share, source), student=ModelConfig(name="./tiny"))
    data.setup(stage)
    return data


def sampler(share, rank=0, ranks=1, rows=23, count=9, size=8, **options):
    made = AnchoredSampler(range(rows), Anchors(share), count, size, num_replicas=ranks, rank=rank, **options)
    made.set_epoch(0)
    return made


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("share", "full"), [(0.1, False), (0.25, True), (0.3, False), (0.5, True), (0.85, False)])
def test_the_share_is_exact_over_time_and_an_epoch_is_a_pass(share, full, ranks):
    per_row = Fraction(str(share)) / (1 - Fraction(str(share)))
    for rank in range(ranks):
        made, seen, anchors = sampler(share, rank, ranks), 0, 0
        for epoch in range(11):
            made.set_epoch(epoch)
            batches = list(made)
            assert len(batches) == len(made)
            for batch in batches:
                of_training = [index for index in batch if index < 23]
                seen, anchors = seen + len(of_training), anchors + len(batch) - len(of_training)
                assert of_training and len(batch) <= 8
                assert anchors == floor(seen * per_row)  # at every moment
            if full:
                assert {len(batch) for batch in batches[:-1]} == {8}
            rows = [index for index in chain(*batches) if index < 23]
            assert len(rows) == len(set(rows)) == made.num_samples


def test_ranks_pass_over_all_anchors_together():
    def of_rank(rank, seed=0):
        made, found = sampler(0.5, rank, 2, rows=36, seed=seed), []
        for epoch in range(2):
            made.set_epoch(epoch)
            found += [index for index in chain(*made) if index >= 36]
        return found

    one, other = of_rank(0), of_rank(1)
    together = list(chain(*zip(one, other, strict=True)))
    for first in range(0, len(together), 9):
        assert sorted(together[first : first + 9]) == list(range(36, 45))
    assert together[:9] != together[9:18] and together[:9] != sorted(together[:9])
    assert one == of_rank(0) != of_rank(0, seed=1)


def test_it_goes_on_at_any_batch():
    whole = list(sampler(0.3))
    for start in range(len(whole)):
        made = sampler(0.3)
        made.start = start
        assert list(made) == whole[start:] and len(made) == len(whole)
        assert list(made) == whole  # the next epoch is whole


def test_an_anchor_has_no_context_and_its_own_teacher(files):
    data = module()
    for workers in (0, 2):
        data.num_workers = workers
        rows = list(chain(*data.train_dataloader()))
        anchors = [row for row in rows if row.example.teacher == "anchors"]
        assert len(rows) - len(anchors) == 10 and len(anchors) == 4  # floor(10 x 3/7)
        assert all(row.context is None and row.teacher_prompt.equal(row.student_prompt) for row in anchors)
        assert all(row.context for row in rows if row not in anchors)
    prompts = {row["query"] for row in read_rows(PROMPTS)}
    assert {example.query for example in data.examples("anchors")} == prompts
    assert len(data.examples("train")) == 10


def test_the_package_measures_drift_on_other_prompts():
    anchors, general = ([row["query"] for row in read_rows(file)] for file in (PROMPTS, GENERAL))
    words = [{" ".join(query.lower().split()) for query in queries} for queries in (anchors, general)]
    assert len(words[0]) == len(anchors) == 128
    assert not words[0] & words[1]


def test_a_loader_begins_where_a_checkpoint_was(files):
    def batches(data, epoch=None):
        loader = data.train_dataloader()
        if epoch is not None:
            loader.sampler.set_epoch(epoch)
        return [[(row.example.query, row.context) for row in rows] for rows in loader]

    data = module()
    whole = batches(data, epoch=2)
    assert whole != batches(data, epoch=0)
    for done in range(len(whole)):
        data.load_state_dict({"epoch": 2, "samples": done * 4})
        assert batches(data) == whole[done:]


def test_edited_anchors_are_noticed(files, write_rows):
    source = write_rows({"query": "Why?"}, {"query": "Who?"}, name="anchors.jsonl")
    then = module(source=source).fingerprint
    write_rows({"query": "Why?"}, {"query": "Where?"}, name="anchors.jsonl")
    assert module(source=source).fingerprint["anchors"] != then["anchors"]
    data = ContextQueryDataModule(
        train="train.jsonl", context="contexts.json", anchors=Anchors(0.3, source), student=ModelConfig(name="./tiny")
    )
    data.go_on_from({"sha256": then})
    with pytest.raises(UserError, match="data: the anchors differ from those that the checkpoint"):
        data.setup("fit")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"query": "a", "context": "c"}], ":1: an anchor has no context (data.anchors); remove the column"),
        ([{"query": "a"}, {"query": "b", "teacher": "t"}], ":2: an anchor has no teacher (data.anchors)"),
        ([{"query": 3}], ":1: query must be text"),
    ],
)
def test_wrong_anchors_are_named(files, write_rows, rows, said):
    source = write_rows(*rows, name="anchors.jsonl")
    with pytest.raises(UserError) as raised:
        module(source=source)
    assert f"{source}{said}" in str(raised.value)


def test_wrong_settings(files):
    for share in (0, 1, -0.5, 1.5):
        with pytest.raises(ValueError, match=r"data\.anchors\.share must lie strictly between 0 and 1"):
            Anchors(share)
    for share, size in ((0.1, 1), (0.9, 9)):
        with pytest.raises(UserError, match=r"data\.anchors\.share: .* leaves a batch of . no row with the context"):
            module(share, batch_size=size)
    assert Anchors(0.9).rows_beside(10) == 1
    with pytest.raises(UserError, match=r"data\.anchors\.source: no file "):
        module(source="not-there.jsonl")
    module(source="not-there.jsonl", val="train.jsonl", stage="validate")  # nothing is trained


def test_two_stages(files):
    data = module(val="train.jsonl")
    data.setup("fit")
    data.setup("validate")
    assert len(data.examples("anchors")) == 128
    assert data.longest_student_prompt("anchors") > 10
