"""A run that was stopped and goes on: of the same data, and shown as one training."""

import json
import shutil

import pytest
import torch

from opcd.checkpoints import write_checkpoint
from opcd.cli.main import main
from opcd.data import context_hash
from opcd.models.model_card import Facts
from opcd.results.run_files import figures, read_metrics
from opcd.results.run_tables import overview, read_runs
from tests.helpers.rows import CONTEXT, ROWS, write_rows


@pytest.fixture(scope="module")
def stopped(tiny, tmp_path_factory):
    """A folder with rows, a context and a run of two steps."""
    folder = tmp_path_factory.mktemp("stopped")
    write_rows(folder / "rows.jsonl", ROWS)
    (folder / "context.txt").write_text(CONTEXT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["opcd"])
        assert main([str(word) for word in words(tiny)]) == 0
    return folder


@pytest.fixture
def again(stopped, tmp_path, tiny, opcd, monkeypatch):
    """The same in a folder of this test's own, and how to go on there."""
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")

    def run(*more: object) -> tuple[int, str]:
        return opcd(*words(tiny), "--ckpt_path", "last", *more)

    return run, tmp_path / "copy"


def words(tiny) -> tuple[object, ...]:
    """Two steps; files are named as seen from the folder, so that its copies are the same to a config."""
    return (
        *("fit", "--model.student.name", tiny, "--model.rollout.init_args.sampling.max_new_tokens", 4),
        *("--data.train", "rows.jsonl", "--data.context", "context.txt", "--data.batch_size", 2),
        *(
            "--model.eval_sampling.max_new_tokens",
            4,
            "--model.optimizer",
            "torch.optim.AdamW",
            "--model.optimizer.lr",
            0.05,
        ),
        *("--trainer.max_steps", 2, "--trainer.precision", "32-true", "--model.lr_scheduler", "null"),
    )


def samples(run) -> list[dict]:
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]


@pytest.mark.case("C4")
def test_a_run_that_goes_on_shows_as_one(again):
    run, folder = again
    first, second = folder / "runs/version_0", folder / "runs/version_1"
    alone, known = read_runs([first])[0], figures(first)
    cut = (first / "metrics.csv").read_text() + "2,0.1"  # what it had begun to write of a third step
    (first / "metrics.csv").write_text(cut)
    code, text = run("--trainer.max_steps", 3)
    assert code == 0, text
    assert "without context, before" in text and "after 3 steps" in text
    before = [row for row in samples(first) if row["step"] == 0]
    assert [row for row in samples(second) if row["step"] == 0] == before
    assert {row["step"] for row in samples(second)} == {0, 3}
    steps = [step for step, _ in read_metrics(second)["train/divergence"]]
    assert steps == [0, 1, 2]
    (one,) = read_runs([first, second])
    assert one.folder == second and one.steps == 3
    row = dict(zip(*(overview([one])[0], overview([one])[1][0]), strict=True))
    assert row["right before"] == alone.right(context=False, last=False)
    assert figures(second)["samples/right_before"] == known["samples/right_before"]
    shutil.rmtree(first)  # what it began with is kept with the run
    assert [step for step, _ in read_metrics(second)["train/divergence"]] == [0, 1, 2]


@pytest.mark.case("C4")
def test_a_report_says_where_a_run_went_on(again, opcd):
    run, folder = again
    assert run("--trainer.max_steps", 3)[0] == 0
    code, text = opcd("report", "runs/version_0", "runs/version_1")
    assert code == 0 and "runs/version_0: another of these runs resumed it" in text
    page = (folder / "report.html").read_text()
    assert "runs/version_1" in page and "<th>runs/version_0" not in page


@pytest.mark.case("C4")
def test_a_run_with_no_step_left_answers_all_the_same(again):
    run, folder = again
    lines = [row for row in samples(folder / "runs/version_0") if row["step"] == 0]
    code, text = run()
    assert code == 0, text
    rows = samples(folder / "runs/version_1")
    assert rows[: len(lines)] == lines and {row["step"] for row in rows} == {0, 2}


@pytest.mark.case("C4")
def test_other_queries_have_no_before(again):
    run, folder = again
    write_rows(folder / "val.jsonl", [{"query": "Who?", "reference": "Odalys"}])
    code, text = run("--trainer.max_steps", 3, "--data.val", "val.jsonl")
    assert code == 0, text
    assert "without context, at step 2" in text and "before" not in text
    (one,) = read_runs([folder / "runs/version_1"])
    assert one.right(context=False, last=False) == "-"
    assert "samples/right_before" not in figures(one.folder)


@pytest.mark.case("D11")
@pytest.mark.parametrize("what", ["contexts", "rows"])
def test_other_data_is_refused(again, what):
    run, folder = again
    if what == "contexts":
        (folder / "context.txt").write_text(CONTEXT + " Be brief.")
    else:
        write_rows(folder / "rows.jsonl", [*ROWS[:-1], ROWS[-1] | {"context": "Another one."}])
    code, text = run("--trainer.max_steps", 3)
    assert code == 2 and f"data: the {what} differ from those that the checkpoint was trained on" in text, text
    assert not (folder / "runs/version_1").exists()
    assert "Restoring states" not in text  # before a model is loaded


@pytest.mark.case("D11")
def test_what_is_no_data_of_training_may_change(again):
    run, folder = again
    (folder / "context.txt").write_text(f"\n{CONTEXT}\n")  # white space around it is no part of it
    write_rows(folder / "rows.jsonl", [row | {"reference": "another"} for row in ROWS])
    assert run("--trainer.max_steps", 3)[0] == 0


@pytest.mark.case("D11")
def test_the_card_names_the_contexts_of_all_trainings(again, opcd):
    _, folder = again
    (folder / "context.txt").write_text("Another context.")
    former = context_hash([CONTEXT])
    code, text = opcd(*words(folder / "runs/version_0/student"))
    assert code == 0, text
    student = folder / "runs/version_1/student"
    assert Facts.read(student).former_contexts == former
    card = (student / "README.md").read_text()
    assert f"| contexts of former trainings (sha256) | {former} |" in card
    assert f"| context (sha256) | {context_hash(['Another context.'])} |" in card


@pytest.mark.case("D26")
@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_begin_from_the_student(again, finished):
    run, folder = again
    if not finished:
        shutil.rmtree(folder / "runs/version_0/student")
    code, text = run("--data.batch_size", 4, "--model.optimizer.lr", 0.01)
    assert code == 2 and "these keys differ: model.optimizer.init_args.lr, data.batch_size" in text
    own = folder / "runs/version_0"
    named = f"--model.student.name {own}/student" if finished else f"`opcd export {own} --to merged"
    assert named in text


@pytest.mark.case("A2")
@pytest.mark.parametrize("command", ["validate", "predict", "fit"])
def test_weights_of_another_student(again, opcd, tiny_teacher, command):
    _, folder = again
    path = folder / "runs/version_0/checkpoints/step=2.ckpt"
    split = {"fit": "train", "validate": "val"}.get(command, command)
    (folder / "runs/version_0/checkpoints/step=2.ckpt.json").unlink()
    whole = torch.load(path, weights_only=True)
    del whole["config"]
    torch.save(whole, path)
    with pytest.warns(UserWarning, match="no manifest"):
        code, text = opcd(
            *(command, "--model.student.name", tiny_teacher, f"--data.{split}", "rows.jsonl", "--ckpt_path", path),
            *("--data.context", "context.txt", "--data.batch_size", 2),
            *(("--trainer.max_steps", 3) if command == "fit" else ()),
        )
    assert code == 2 and "is of another student than model.student" in text and "has another shape of" in text


@pytest.mark.case("A3")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loops", {"fit_loop": 3}),
        ("loops", {}),
        ("optimizer_states", [{}]),
        ("callbacks", {"AnswerSamples": {"rows": [3]}}),
        ("callbacks", {"AnswerSamples": 3}),
        ("exact_resume", [3]),
        ("exact_resume", [{"python": 1, "numpy": 1, "torch": 1, "cuda": None, "prefix": {}}]),
        ("ContextQueryDataModule", {"epoch": "a"}),
        ("ContextQueryDataModule", {"sha256": 3}),
        ("bad_steps", ["a"]),
    ],
)
def test_what_cannot_be_restored_is_told(again, key, value):
    run, folder = again
    path = folder / "runs/version_0/checkpoints/step=2.ckpt"
    whole = torch.load(path, weights_only=True)
    write_checkpoint(whole | {key: value}, path)
    code, text = run("--trainer.max_steps", 3)
    assert code == 2 and "Traceback" not in text and "step=2.ckpt" in text.split("opcd: error:")[1], text
    assert not (folder / "runs/version_1").exists()
