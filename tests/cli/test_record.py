"""`opcd record` and a run from its record: the same weights as with teacher and rollout at hand."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opcd.losses import Head
from opcd.modules.fixed_responses import likeliest
from opcd.modules.lm.hidden_states import HiddenStates
from opcd.modules.teachers.record_folder import INDEX, Origin, Record, RecordWriter
from opcd.runtime.errors import UserError
from tests.helpers.training import greedily

TOP = "{class_path: opcd.losses.TopK, init_args: {inner: {class_path: opcd.losses.ForwardKL}, k: 16, support: teacher}}"


@pytest.fixture
def words(tiny, tiny_teacher, rows, context, tmp_path):
    """An off-policy config: a teacher of another width, greedy responses, the teacher's 16 likeliest tokens."""
    return [
        *("--model.student.name", tiny, "--model.student.dtype", "float32", "--trainer.precision", "32-true"),
        *("--model.teacher.init_args.model", f"{{name: {tiny_teacher}, dtype: float32}}"),
        *("--model.rollout.class_path", "opcd.modules.TeacherRollout"),
        *("--model.rollout.init_args.sampling", "{max_new_tokens: 6, temperature: 0.0}"),
        *("--model.loss", TOP, "--model.temperature", "0.8", "--model.optimizer.class_path", "torch.optim.SGD"),
        *("--model.optimizer.init_args.lr", "0.1", "--data.train", str(rows), "--data.context", str(context)),
        *("--data.batch_size", "4", "--trainer.max_steps", "2", "--trainer.default_root_dir", str(tmp_path / "runs")),
    ]


@pytest.fixture
def recorded(opcd, words, tmp_path):
    """A finished record of 16 tokens a position."""
    code, output = opcd("record", "--out", tmp_path / "record", "--k", 16, "--shard_rows", 4, *words)
    assert code == 0, output
    assert "8 of 8 responses" in output
    return tmp_path / "record"


def from_record(words, folder):
    teacher = json.dumps({"class_path": "opcd.modules.RecordedTeacher", "init_args": {"folder": str(folder)}})
    place = words.index("--model.teacher.init_args.model")
    return [*words[:place], "--model.teacher", teacher, *words[place + 2 :]]


def from_folder(words, folder):
    """The words of a run from the responses and the scores of a record."""
    rollout = json.dumps({"class_path": "opcd.modules.RecordedRollout", "init_args": {"folder": str(folder)}})
    place = words.index("--model.rollout.class_path")
    return from_record([*words[:place], "--model.rollout", rollout, *words[place + 4 :]], folder)


@pytest.fixture
def by_student(words):
    """An on-policy config of one step on all eight rows; greedy."""
    place = words.index("--model.rollout.class_path")
    rollout = ["--model.rollout", "StudentRollout", "--model.rollout.init_args.dtype", "float32", *words[place + 2 :]]
    return [*words[:place], *rollout, "--data.batch_size", "8", "--trainer.max_steps", "1"]


@pytest.fixture
def record_by_student(opcd, by_student, tmp_path):
    """A finished record of the student's responses."""
    folder = tmp_path / "by_student"
    code, output = opcd("record", "--out", folder, "--writer", "student", "--k", 16, "--shard_rows", 4, *by_student)
    assert code == 0, output
    return folder


def student(folder):
    return load_file(folder / "student/model.safetensors")


def test_a_run_from_a_record_learns_what_the_teacher_teaches(opcd, words, recorded, tmp_path):
    assert opcd("fit", *words)[0] == 0
    code, output = opcd("fit", *from_record(words, recorded))
    assert code == 0, output
    live, replayed = student(tmp_path / "runs/version_0"), student(tmp_path / "runs/version_1")
    for name, weight in live.items():
        torch.testing.assert_close(replayed[name], weight, rtol=1e-4, atol=1e-6)
    logged = (tmp_path / "runs/version_1/metrics.csv").read_text()
    assert "train/top1_agreement" in logged and "teacher_entropy" not in logged


def test_the_students_responses_are_greedy_without_the_context(record_by_student, batch, tiny):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    record = Record(record_by_student, "key")
    assert record.origin.student == tiny
    with torch.no_grad():
        for row in batch.rows:
            assert record.draw(row.teacher_prompt).tolist() == greedily(model, row.student_prompt, 6)


def test_a_run_from_the_students_record_learns_what_a_live_one_learns(opcd, by_student, record_by_student, tmp_path):
    """The first step: the student is the one that was recorded."""
    assert opcd("fit", *by_student)[0] == 0
    place = by_student.index("--model.rollout")
    words = [*by_student[:place], "--model.rollout.class_path", "x", *by_student[place + 4 :]]
    code, output = opcd("fit", *from_folder(words, record_by_student))
    assert code == 0, output
    live, replayed = student(tmp_path / "runs/version_0"), student(tmp_path / "runs/version_1")
    for name, weight in live.items():
        torch.testing.assert_close(replayed[name], weight, rtol=1e-4, atol=1e-6)


def test_recorded_responses_with_a_teacher_that_scores_the_whole_vocabulary(opcd, words, record_by_student, tmp_path):
    rollout = {"class_path": "RecordedRollout", "init_args": {"folder": str(record_by_student)}}
    place = words.index("--model.rollout.class_path")
    live = [*words[:place], *words[place + 4 :], "--model.loss", "ReverseKL", "--model.temperature", "1.0"]
    code, output = opcd("fit", *live, "--model.rollout", json.dumps(rollout))
    assert code == 0, output
    code, output = opcd("fit", *live, "--model.rollout", json.dumps(rollout), "--data.placement", "user")
    assert code == 2 and "model.rollout's folder: a prompt is not in" in output


def test_the_teachers_record_is_read_by_both_rollouts(opcd, words, recorded, tmp_path):
    assert opcd("fit", *from_record(words, recorded))[0] == 0
    assert opcd("fit", *from_folder(words, recorded))[0] == 0
    one, other = student(tmp_path / "runs/version_0"), student(tmp_path / "runs/version_1")
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_who_wrote_a_record_is_known(opcd, words, by_student, recorded, record_by_student):
    code, output = opcd("record", "--out", recorded, "--writer", "student", "--k", 16, "--shard_rows", 4, *by_student)
    assert code == 2 and "a record with another student" in output
    code, output = opcd("fit", *from_record(words, record_by_student))
    assert code == 2 and "TeacherRollout takes others; use RecordedRollout with folder:" in output
    index = json.loads((recorded / INDEX).read_text())
    del index["origin"]["student"]
    (recorded / INDEX).write_text(json.dumps(index))
    assert opcd("record", "--out", recorded, "--k", 16, "--shard_rows", 4, *words)[0] == 0  # older than the field


def test_new_responses_need_a_teacher_that_runs(opcd, words, recorded):
    refreshed = ("--model.rollout.init_args.refresh_every_n_steps", "3")
    code, output = opcd("fit", *from_folder(words, recorded), *refreshed)
    assert code == 2 and "without refresh_every_n_steps, or a teacher that scores new responses" in output, output


def test_a_record_that_was_stopped_goes_on_to_the_same_files(opcd, words, recorded):
    files = {path.name: path.read_bytes() for path in recorded.iterdir()}
    index = json.loads(files[INDEX])
    (recorded / index["shards"][1]["file"]).unlink()
    (recorded / INDEX).write_text(json.dumps({**index, "shards": index["shards"][:1]}))
    code, output = opcd("fit", *from_record(words, recorded))
    assert code == 2 and "holds 4 of 8 responses" in output
    assert opcd("record", "--out", recorded, "--k", 16, "--shard_rows", 4, *words)[0] == 0
    assert {path.name: path.read_bytes() for path in recorded.iterdir()} == files


def test_what_the_student_has_no_token_for_is_not_recorded():
    found = likeliest(HiddenStates(torch.arange(10.0)[None], Head(torch.eye(10))), 3, 8, temperature=2.0)
    assert found.tokens.tolist() == [[7, 6, 5]]
    torch.testing.assert_close(found.log_probs, (torch.arange(8.0) / 2).log_softmax(-1)[[7, 6, 5]][None])


def test_several_responses_to_a_query(opcd, words, tmp_path):
    words = [word.replace("temperature: 0.0", "temperature: 1.0") for word in words]
    code, output = opcd("record", "--out", tmp_path / "record", "--k", 16, "--samples", 2, *words)
    assert code == 0 and "16 of 16 responses" in output
    assert opcd("fit", *from_record(words, tmp_path / "record"))[0] == 0


def test_a_damaged_record(opcd, words, recorded):
    shard = recorded / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, output = opcd("fit", *from_record(words, recorded))
    assert code == 2 and "is damaged (its SHA-256 differs)" in output


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("--model.temperature", "1.0"), "recorded at 0.8"),
        (("--model.loss", "ForwardKL"), "use TopK with support: teacher"),
        (("--model.loss", TOP.replace("16", "17")), "use k=16"),
        (("--model.rollout", "StudentRollout"), "StudentRollout takes others; use RecordedRollout with folder:"),
        (("--model.rollout.init_args.sampling", "{max_new_tokens: 5, temperature: 0.0}"), "must be that of the record"),
        (("--data.placement", "user"), "a prompt is not in"),
    ],
)
def test_a_run_that_the_record_does_not_serve(change, says, opcd, words, recorded):
    code, output = opcd("fit", *from_record(words, recorded), *change)
    assert code == 2 and says in output, output


def test_what_cannot_be_recorded(opcd, words, recorded, tmp_path):
    code, output = opcd("record", "--out", recorded, "--k", 8, *words)
    assert code == 2 and "a record with another k" in output
    code, output = opcd("record", "--out", tmp_path / "r", *words, "--model.rollout", "StudentRollout")
    assert (
        code == 2 and "TeacherRollout for --writer teacher, not StudentRollout; change it, or give --writer" in output
    )
    code, output = opcd("record", "--out", tmp_path / "r", *words, "--writer", "student")
    assert code == 2 and "StudentRollout for --writer student, not TeacherRollout" in output
    code, output = opcd("record", "--out", tmp_path / "r", *words, "--model.teacher", "SelfTeacher")
    assert code == 2 and "a record holds no scores that change with the student" in output
    code, output = opcd("record", "--out", tmp_path / "r", *words, "--model.teacher.init_args.shard", "true")
    assert code == 2 and "shard has no effect on one rank" in output
    code, output = opcd("record", "--out", tmp_path / "r", "--k", 0, *words)
    assert code == 2 and "--k must be at least 1" in output
    code, output = opcd("fit", *from_record(words, tmp_path / "nothing"))
    assert code == 2 and "no record in" in output


ORIGIN = Origin("teacher", "t", "c", rows=1, samples=1, temperature=1.0, k=1, sampling={}, seed=0)


@pytest.mark.case("E1")
def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "shard-00000.safetensors").write_text("weights of mine")
    with pytest.raises(UserError, match=r"--out: .*did not write there \(shard-00000\.safetensors\)"):
        RecordWriter(tmp_path, ORIGIN)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["weights of mine"]


@pytest.mark.case("E1")
def test_a_record_that_was_killed_before_its_first_shard_goes_on_also_as_another(tmp_path):
    RecordWriter(tmp_path, ORIGIN)
    (tmp_path / ".shard-00000.safetensors.0123456789abcdef-being-written").write_text("half")
    writer = RecordWriter(tmp_path, replace(ORIGIN, k=2))
    tokens = torch.zeros(1, 2, dtype=torch.long)
    writer.add([torch.tensor([1])], [torch.tensor([2])], tokens, torch.zeros(1, 2))
    assert Record(tmp_path, "key").origin.k == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [INDEX, "shard-00000.safetensors"]


@pytest.mark.case("E6")
def test_a_full_disk_while_a_shard_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    writer = RecordWriter(tmp_path, ORIGIN)
    monkeypatch.setattr("opcd.modules.teachers.record_folder.save_file", full)
    with pytest.raises(UserError, match=r"no room for .*shard-00000\.safetensors: it takes .*MiB are free"):
        writer.add([torch.tensor([1])], [torch.tensor([2])], torch.zeros(1, 1).long(), torch.zeros(1, 1))
    assert [file.name for file in tmp_path.iterdir()] == [INDEX]
