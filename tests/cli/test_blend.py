"""`opcd blend`: its figures at both ends are the run's, what lies between is by the definition, and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file

from opcd.models import ModelConfig, load_model
from opcd.models.model_card import Facts
from tests.helpers.rows import read_rows, write_rows

MEASURED = ("effect", "left", "recovery", "drift")


@pytest.fixture
def fit(opcd, tiny, rows, context, tmp_path):
    """A run of three steps; returns its folder."""

    def run(*more):
        code, text = opcd(
            *("fit", "--model.student.name", tiny, "--trainer.precision", "32-true", "--trainer.max_steps", 3),
            *("--data.train", rows, "--data.val", rows, "--data.context", context, "--model.loss", "ForwardKL"),
            *("--model.rollout.init_args.sampling.max_new_tokens", 4, "--model.optimizer.lr", 0.003),
            *("--trainer.callbacks+", "RecoveryAndDrift", "--trainer.callbacks.queries", 5),
            *("--trainer.callbacks.general_prompts", 3, "--trainer.callbacks.max_new_tokens", 5),
            *("--trainer.default_root_dir", tmp_path / "runs", "--trainer.enable_checkpointing", "false", *more),
        )
        assert code == 0, text
        return tmp_path / "runs" / "version_0"

    return run


def scores(run):
    return {row["scale"]: row for row in json.loads((run / "blend.json").read_text())["scales"]}


def check_ends(run):
    """The start has recovered nothing and moved nowhere; the end has what the run measured last."""
    found, last = scores(run), read_rows(run / "recovery.jsonl")[-1]
    assert found[0.0]["recovery"] == pytest.approx(0, abs=1e-5) and found[0.0]["drift"] == pytest.approx(0, abs=1e-5)
    for name in MEASURED:
        assert found[1.0][name] == pytest.approx(last[name], rel=1e-3, abs=1e-5), name
    assert last["recovery"] > 0.02 and last["drift"] > 1e-4
    assert 0 < found[0.5]["drift"] < last["drift"]
    assert (found[1.0]["queries"], found[1.0]["split"], found[1.0]["prompts"]) == (5, "val", 3)


def test_full_weights(opcd, fit, tiny, tmp_path):
    run = fit()
    code, text = opcd("blend", run, "--scales", 1, 0, 0.5)
    assert code == 0, text
    check_ends(run)
    lines = text[text.index("| scale") :].splitlines()
    assert lines[0] == "| scale | recovery | drift, nats a token |"
    assert [line.split(" | ")[0] for line in lines[2:5]] == ["| 0", "| 0.5", "| 1"]
    half = scores(run)[0.5]

    code, text = opcd("blend", run, "--keep", 0.25, "--out", tmp_path / "quarter", "--scales", 0.5)
    assert code == 0, text
    assert list(scores(run)) == [0.25, 0.5] and scores(run)[0.5] == half
    start = load_model(ModelConfig(name=tiny), torch.float32).state_dict()
    end, kept = (load_file(folder / "model.safetensors") for folder in (run / "student", tmp_path / "quarter"))
    assert end.keys() == kept.keys()
    for name, weight in kept.items():
        expected = start[name].double() + 0.25 * (end[name].double() - start[name].double())
        torch.testing.assert_close(weight.double(), expected, rtol=0, atol=1e-6)
    assert any(not torch.equal(kept[name], end[name]) for name in kept)
    facts = Facts.read(tmp_path / "quarter")
    assert facts.scale == 0.25 and f"{scores(run)[0.25]['drift']:.3f}" in facts.drift
    assert "| share of the change that was kept | 0.25 |" in (tmp_path / "quarter" / "README.md").read_text()
    code, text = opcd("blend", run, "--keep", 0.25, "--out", tmp_path / "quarter")
    assert code == 2 and "--out" in text and "exists already" in text


def test_an_adapter_stays_one(opcd, fit, tmp_path):
    run = fit("--model.adapter.rank", 2, "--model.teacher", "BaseTeacher")
    code, text = opcd("blend", run, "--scales", 0, 0.5, 1, "--keep", 0.5, "--out", tmp_path / "half")
    assert code == 0, text
    check_ends(run)
    end, kept = (load_file(folder / "adapter_model.safetensors") for folder in (run / "student", tmp_path / "half"))
    assert end.keys() == kept.keys()
    for name, weight in kept.items():
        torch.testing.assert_close(weight, end[name] * (0.5 if "lora_B" in name else 1.0))
    settings = [
        json.loads((folder / "adapter_config.json").read_text()) for folder in (run / "student", tmp_path / "half")
    ]
    assert settings[0]["lora_alpha"] == settings[1]["lora_alpha"]
    assert "library_name: peft" in (tmp_path / "half" / "README.md").read_text()


def test_tasks_on_validation_rows_alone(opcd, fit, tmp_path):
    val, test = (write_rows(tmp_path / f"{n}.jsonl", [{"query": n, "reference": "a"}] * 3) for n in ("val", "test"))
    run = fit("--data.test", test)
    ask = ("blend", run, "--tasks", "contains", "--max_new_tokens", 3)
    code, text = opcd(*ask, "--data.contains", val, "--scales", 1)
    assert code == 0, text
    assert "| scale | recovery | drift, nats a token | contains: " in text
    assert scores(run)[1.0]["tasks"]["contains"]["n"] == 3
    for words, said in (
        ((*ask, "--data.contains", test), "--data.contains: these are the run's data.test"),
        (("blend", run, "--limit", 3), "--limit has no effect without --tasks"),
        (("blend", run, "--keep", 0.5), "--keep SCALE and --out FOLDER go together"),
        (("blend", run, "--scales", -1), "--scales: -1 must lie between 0"),
        (("blend", run, "--vla", val), "did you mean --val"),
        (("blend", run / "student"), "is no run of `opcd fit`: it has no config.yaml"),
    ):
        code, text = opcd(*words)
        assert code == 2 and said in text, text


def test_held_out_queries_are_needed(opcd, fit, rows):
    run = fit("--data.val", "null")
    code, text = opcd("blend", run)
    assert code == 2 and "it has no data.val" in text
    code, text = opcd("blend", run, "--val", rows, "--scales", 1)
    assert code == 0, text
    assert scores(run)[1.0]["split"] == "val"


def test_a_cartridge_is_refused(opcd, fit):
    run = fit("--model.adapter", "Cartridge", "--model.adapter.num_virtual_tokens", 4)
    code, text = opcd("blend", run)
    assert code == 2 and "is a Cartridge: its keys and values are no change of the weights" in text
