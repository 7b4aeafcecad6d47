"""`opcd.distill`: the command's own run, from Python objects, that leaves the process as it was."""

import gc
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning import Callback
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import opcd
from opcd.callbacks import RecoveryAndDrift, SaveCheckpoints
from opcd.losses import JSD
from opcd.models import ModelConfig
from opcd.models import gguf_folder as gguf
from opcd.modules import Cartridge, Distiller, Lora, Sampling, SelfTeacher, StudentRollout
from opcd.queries.askers import Asker, Tried
from opcd.runtime.errors import UserError
from opcd.writing.written import Written
from tests.helpers.paths import ROOT
from tests.helpers.rows import CONTEXT, ROWS, read_rows, write_rows

RECIPE = ROOT / "opcd" / "cli" / "starter" / "facts" / "recipe.yaml"
FACTS = "The harbour master of Quillhaven is called Odalys. Its lighthouse was built by Bram Tulliver."
FERRIES = "\n".join(f"- Ferry number {n} of Lindholm sails to Island{n}." for n in range(12))
NOTEBOOK = ROOT / "examples" / "distill.ipynb"
SMALL = {
    "steps": 1,
    "batch_size": 2,
    "rollout": StudentRollout(Sampling(max_new_tokens=2)),
    "callbacks": [RecoveryAndDrift(queries=2, general_prompts=1, max_new_tokens=2)],
    "accelerator": "cpu",
    "enable_progress_bar": False,
}
"""Arguments of a run of a second."""


def distil(tiny, queries=ROWS, context=FACTS, **changed):
    return opcd.distill(tiny, context, queries, **SMALL | changed)


def process() -> dict[str, object]:
    """What a library should leave alone."""
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    states = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]  # noqa: NPY002
    streams = [sys.stdout, sys.stderr, *sys.argv]
    return {
        "environment": dict(os.environ),
        "signals": handlers,
        "generators": states,
        "streams": streams,
        "working folder": Path.cwd(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
    }


def weights(model) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in model.state_dict().items()}


def test_it_is_the_run_of_the_command(opcd, tiny, tmp_path):
    result = distil(tiny, steps=2, rollout=None, val=ROWS[:3], callbacks=(), accelerator="cpu")
    (tmp_path / "context.txt").write_text(FACTS)
    rows, val = write_rows(tmp_path / "rows.jsonl", ROWS), write_rows(tmp_path / "val.jsonl", ROWS[:3])
    code, text = opcd(
        *("fit", "--config", RECIPE, "--model.student.name", tiny, "--data.train", rows, "--data.val", val),
        *("--data.context", tmp_path / "context.txt", "--data.batch_size", 2, "--trainer.max_steps", 2),
        *("--trainer.default_root_dir", tmp_path, "--trainer.enable_checkpointing", "false"),
        *("--trainer.accelerator", "cpu", "--model.lr_scheduler.init_args.total_iters", 2),
    )
    assert code == 0, text
    run = tmp_path / "version_0"
    result.save(tmp_path / "saved")
    of_command, own = (load_file(folder / "model.safetensors") for folder in (run / "student", tmp_path / "saved"))
    start = load_file(Path(tiny) / "model.safetensors")
    assert of_command.keys() == own.keys()
    assert all(torch.equal(of_command[name], own[name]) for name in own)
    assert not all(torch.equal(start[name], own[name]) for name in own)
    assert [vars(one) for one in result.measured] == read_rows(run / "recovery.jsonl")
    assert result.samples == read_rows(run / "samples.jsonl")
    assert result.before == [row for row in result.samples if row["step"] == 0 and not row["context"]]
    assert [row["step"] for row in result.after] == [2, 2, 2]
    assert result.recovery == result.measured[-1].recovery and result.drift == result.measured[-1].drift
    facts = [json.loads((at / "distillation.json").read_text()) for at in (run / "student", tmp_path / "saved")]
    assert {name for name in facts[0] if facts[0][name] != facts[1][name]} == {"context", "data"}
    assert facts[1]["context"] is None and facts[1]["data"] == "8 rows in memory"


def test_twice_in_one_process_that_stays_as_it_was(tiny):
    before = process()
    one = distil(tiny)
    assert process() == before
    torch.rand(5)
    other = distil(tiny, queries=iter(ROWS))
    assert one.samples == other.samples
    first, second = weights(one.student), weights(other.student)
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = weights(distil(tiny, seed=1).student)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_what_a_result_has(tiny, tmp_path):
    result = distil(tiny, folder=tmp_path / "runs")
    assert not result.student.training and result.answer(ROWS[0]["query"]) == result.after[0]["answer"]
    assert str(result).splitlines()[0] == f"{tiny} after 1 steps"
    assert result.measured[-1].sentence() in str(result)
    assert "right without the context, of 6 sampled questions: 0 before, 0 after" in str(result)
    assert result.folder == tmp_path / "runs" / "version_0" and result.train == ROWS and result.val is None
    assert {file.name for file in result.folder.iterdir()} == {
        *("environment.json", "metrics.csv", "recovery.jsonl", "samples.jsonl", "student"),
    }
    assert not (tmp_path / "runs" / ".version_0.lock").exists()
    result.save(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in result.student.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == result.tokenizer.chat_template
    (tmp_path / "saved" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"folder: .* holds files that opcd did not write there \(notes.txt\)"):
        result.save(tmp_path / "saved")
    assert distil(tiny, queries=result.train, folder=tmp_path / "runs").folder.name == "version_1"


def test_the_student_alone_stays_in_memory(tiny):
    def alive() -> Counter:
        kinds = (Distiller, torch.optim.AdamW, LlamaForCausalLM)
        return Counter(type(one) for one in gc.get_objects() if type(one) in kinds)

    gc.collect()
    before = alive()
    result = distil(tiny, callbacks=())  # one of the caller's own would keep its trainer
    assert alive() - before == {LlamaForCausalLM: 1} and isinstance(result.student, LlamaForCausalLM)


def test_no_folder_leaves_none(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert distil(tiny).folder is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("rows", "steps"), [(4, 36), (70, 105)])
def test_without_steps_it_makes_six_passes_and_the_recipes_steps_at_least(tiny, rows, steps):
    planned = []

    class Stop(Callback):
        def on_train_start(self, trainer, distiller):
            planned.extend([trainer.max_steps, trainer.lr_scheduler_configs[0].scheduler.total_iters])
            trainer.should_stop = True
            trainer.fit_loop.epoch_loop.min_steps = trainer.fit_loop.min_epochs = 0

    queries = [{"query": f"Who lives in house {number}?"} for number in range(rows)]
    distil(tiny, queries=queries, steps=None, batch_size=4, callbacks=[*SMALL["callbacks"], Stop()])
    assert planned == [steps, steps]


def test_arguments_replace_the_recipes_values(tiny, tiny_teacher):
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, distiller):
            (group,) = trainer.optimizers[0].param_groups
            seen.update(lr=group["lr"], loss=distiller.objective.loss, temperature=distiller.objective.temperature)
            seen.update(teacher=distiller.teacher, steps=trainer.max_steps, batch=trainer.datamodule.batch_size)
            seen.update(known=trainer.datamodule.teacher, checkpoints=trainer.checkpoint_callbacks)

    look = [*SMALL["callbacks"], Look()]
    distil(tiny, learning_rate=0.5, loss=JSD(0.3), teacher=ModelConfig(tiny_teacher), callbacks=look)
    assert seen["lr"] == 0.5 and str(seen["loss"]) == "JSD(beta=0.3)"
    assert seen["teacher"].config == seen["known"] == ModelConfig(tiny_teacher)
    assert (seen["steps"], seen["batch"], seen["checkpoints"]) == (1, 2, [])
    manner, facts = (
        yaml.safe_load((RECIPE.parents[1] / kind / "recipe.yaml").read_text()) for kind in ("manner", "facts")
    )
    assert seen["temperature"] == facts["model"]["temperature"] != manner["model"]["temperature"]
    distil(tiny, teacher=SelfTeacher(), kind="manner", callbacks=look)
    assert seen["temperature"] == manner["model"]["temperature"] and isinstance(seen["teacher"], SelfTeacher)
    assert seen["lr"] == manner["model"]["optimizer"]["init_args"]["lr"]


def test_an_adapter_is_trained_beside_its_base(tiny, tmp_path):
    result = distil(tiny, adapter=Lora(rank=2), steps=2, learning_rate=1e-2)
    start = load_file(Path(tiny) / "model.safetensors")
    now = result.student.state_dict()
    assert torch.equal(now["model.embed_tokens.weight"].float(), start["model.embed_tokens.weight"].float())
    assert any("lora_B" in name and weight.abs().sum() > 0 for name, weight in now.items())
    result.save(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    facts = json.loads((tmp_path / "adapter" / "distillation.json").read_text())
    assert list(facts["teacher"]) == ["BaseTeacher"]


def test_a_cartridge_is_trained_beside_its_base(tiny, tmp_path):
    result = distil(tiny, adapter=Cartridge(num_virtual_tokens=4), learning_rate=1e-2)
    assert result.student.model.cartridge.config.num_virtual_tokens == 4
    result.save(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "CARTRIDGE"


class Ferries(Asker):
    """Asks about a ferry by its number, in another way each time, and knows where it goes."""

    name, least_effect, calls = "ferries", 0.1, 0

    def count(self, text):
        return len(text.split())

    def write(self, conversations, seed, temperature):
        Ferries.calls += 1
        numbers = [turns[-1]["content"].rpartition("Ferry number ")[2].split()[0] for turns in conversations]
        return [Written(f"Which way does ferry {n} of Lindholm go on day {seed}?", 7, False) for n in numbers]

    def try_out(self, questions, context, seed):
        answers = [f"It goes to Island{question.partition('ferry ')[2].split()[0]}." for question in questions]
        return [Tried(answer, answer, 1.0) for answer in answers]


@pytest.fixture
def ferries(monkeypatch):
    """The options that the questions were made with, by an asker whose words are known."""
    asked = []
    Ferries.calls = 0
    monkeypatch.setattr("opcd.cli.queries._asker", lambda options: asked.append(options) or Ferries())
    return asked


def test_without_queries_they_are_written_and_kept_with_the_run(tiny, tiny_teacher, tmp_path, ferries, capsys):
    folder = tmp_path / "runs"
    result = distil(tiny, queries=None, context=FERRIES, folder=folder, teacher=tiny_teacher)
    assert "questions kept (facts, ferries)" in capsys.readouterr().out
    assert len(result.train) >= 12 and len(result.val) == 16 and result.measured[-1].split == "val"
    assert {row["query"] for row in result.val}.isdisjoint(row["query"] for row in result.train)
    assert (ferries[0].model, ferries[0].student) == (ModelConfig(tiny_teacher), ModelConfig(tiny))
    calls = Ferries.calls
    document = tmp_path / "ferries.md"
    document.write_text(FERRIES)
    again = distil(tiny, queries=None, context=document, folder=folder, teacher=tiny_teacher)
    assert again.train == result.train and Ferries.calls == calls
    assert sorted(entry.name[:8] for entry in folder.iterdir()) == ["queries-", "version_", "version_"]
    other = distil(tiny, queries=None, context=FERRIES + "\n- Ferry number 20 of Lindholm sails to Island20.", val=ROWS)
    assert other.val == ROWS and other.folder is None and Ferries.calls > calls
    assert (ferries[-1].model, ferries[-1].student, ferries[-1].val) == (ModelConfig(tiny), None, 0)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"queries": [*ROWS, {"qury": "a"}]}, r"data\.train: row 9: unknown key 'qury'; did you mean query"),
        ({"queries": []}, r"data\.train: no rows"),
        ({"queries": {"query": "a"}}, r"data\.train: a dictionary \(query\); give a list of rows"),
        ({"val": [3]}, r"data\.val: row 1: a row must be an object"),
        ({"context": " "}, "the context .* is empty"),
        ({"context": 3}, "context must be a text, or a pathlib.Path of a document, not int"),
        ({"context": Path("nowhere.txt")}, "context: no file .*nowhere.txt"),
        ({"steps": 0}, "steps must be at least 1, not 0"),
        ({"kind": "fact"}, "kind must be one of auto, facts, manner, not 'fact'"),
        ({"max_steps": 3}, "max_steps of the Trainer is called steps here"),
        ({"loss": "JSD"}, "loss must be an object of a class of opcd.losses.* not 'JSD'"),
        ({"adapter": 8}, "adapter must be an object"),
        ({"teacher": 8}, "teacher must be a name, a folder, a hub id or a ModelConfig, not int"),
        ({"teacher": "smollm2-135"}, "did you mean smollm2-135m"),
    ],
)
def test_mistakes_are_told_and_leave_no_run(tiny, tmp_path, changed, says):
    with pytest.raises(UserError, match=says):
        distil(tiny, folder=tmp_path, **changed)
    assert not list(tmp_path.glob("version_*"))


def test_the_name_of_a_file_is_no_context(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text(CONTEXT)
    with pytest.raises(UserError, match=r"notes.txt is a file, and its text is expected"):
        distil(tiny, context="notes.txt")


def test_a_loaded_model_is_to_be_saved_first(tiny):
    with pytest.raises(UserError, match=r"not LlamaForCausalLM: save model and tokenizer with save_pretrained"):
        distil(AutoModelForCausalLM.from_pretrained(tiny))


def test_an_unknown_argument_is_told_before_questions_are_written(tiny, tmp_path, ferries):
    with pytest.raises(TypeError, match="max_step"):
        distil(tiny, queries=None, folder=tmp_path, max_step=3)
    assert not ferries and not list(tmp_path.glob("version_*"))


def test_ctrl_c_ends_the_call_and_not_the_process(tiny, tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                os.kill(os.getpid(), signal.SIGINT)

    before = process()
    callbacks = [*SMALL["callbacks"], Stop(), SaveCheckpoints(every_n_steps=1)]
    with pytest.raises(KeyboardInterrupt):
        distil(tiny, steps=9, callbacks=callbacks, folder=tmp_path)
    assert process() == before
    assert [file.name for file in (tmp_path / "version_0").glob("checkpoints/*.ckpt")] == ["step=1.ckpt"]
    assert distil(tiny).recovery is not None


@pytest.mark.filterwarnings("ignore::UserWarning")  # a tiny model writes no end of an answer
def test_the_notebook_runs(tiny, tmp_path, monkeypatch):
    """Its code cells in one namespace: nbclient is not installed here. The packaged model is a tiny one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf, "converted", lambda *_: tiny)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    names: dict[str, object] = {}
    for number, cell in enumerate(notebook["cells"]):
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        )
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), f"{NOTEBOOK.name}, cell {number}", "exec"), names)
    assert isinstance(names["result"], opcd.Result) and Path("student/config.json").is_file()
