"""The files of examples/: each trains as its docstring says, and does what it claims."""

import csv
import json

import pytest
import torch
import yaml
from torch.testing import assert_close

from examples.data_source import Csv
from examples.loss import Renyi
from examples.rollout import TeacherStart
from examples.teacher import SnapshotTeacher
from opcd.accel.precision import fast_dtype
from opcd.losses import ForwardKL
from opcd.models import ModelConfig
from opcd.modules import FrozenTeacher, Sampling, Student
from opcd.runtime.errors import UserError
from tests.helpers.paths import ROOT

DOORS = {
    "class_path": "opcd.games.GameSeeds",
    "init_args": {"environment": {"class_path": "examples.environment.Doors"}, "start": 0, "count": 8, "max_turns": 2},
}


@pytest.fixture
def fit(opcd, tiny, rows, context, tmp_path):
    """One step of the tiny student with something of examples/; the run's metrics and the config that it kept."""

    def run(*more: object, steps: int = 1) -> tuple[dict[str, str], dict]:
        code, text = opcd(
            *("fit", "--model.student.name", tiny, "--data.train", rows, "--data.context", context),
            *("--model.rollout.init_args.sampling.max_new_tokens", 4, "--trainer.max_steps", steps),
            *("--trainer.default_root_dir", tmp_path / "runs", "--trainer.enable_checkpointing", "false", *more),
        )
        assert code == 0, text
        folder = tmp_path / "runs" / "version_0"
        with (folder / "metrics.csv").open() as lines:
            steps = [row for row in csv.DictReader(lines) if row["train/divergence"]]
            return steps[-1], yaml.safe_load((folder / "config.yaml").read_text())

    return run


def test_a_loss(fit):
    metrics, config = fit("--model.loss", "examples.loss.Renyi", "--model.loss.init_args.alpha", 0.3)
    assert config["model"]["loss"] == {"class_path": "examples.loss.Renyi", "init_args": {"alpha": 0.3}}
    assert float(metrics["train/divergence"]) > 0


def test_its_values_are_the_definition():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 7), torch.randn(3, 7)
    p_s, p_t = student.double().softmax(-1), teacher.double().softmax(-1)
    expected = (p_t**0.3 * p_s**0.7).sum(-1).log() / (0.3 - 1)
    assert_close(Renyi(0.3)(student, teacher), expected.float())
    close_to_one = Renyi(0.9999)(student.double(), teacher.double())
    assert_close(close_to_one, ForwardKL()(student.double(), teacher.double()), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="ForwardKL"):
        Renyi(1.0)


def test_a_teacher(fit):
    metrics, config = fit(
        *("--model.teacher", "examples.teacher.SnapshotTeacher", "--model.teacher.init_args.every_n_steps", 1),
        steps=2,
    )
    assert config["model"]["teacher"]["init_args"] == {"every_n_steps": 1}
    assert float(metrics["train/divergence"]) > 0


def test_it_follows_the_student_when_its_time_is_over(tiny):
    student, teacher = Student.load(ModelConfig(name=tiny)), SnapshotTeacher(2)
    teacher.setup(student, ModelConfig(name=tiny), torch.device("cpu"))
    weight = "model.norm.weight"
    for step in range(1, 4):
        with torch.no_grad():
            student.model.get_parameter(weight).add_(1.0)
        teacher.on_student_step(student)
        assert_close(teacher.model.get_parameter(weight).mean(), torch.tensor(1.0 if step < 2 else 3.0))
    again = SnapshotTeacher(2)
    again.setup(student, ModelConfig(name=tiny), torch.device("cpu"))
    again.load_state_dict(teacher.state_dict())
    again.on_student_step(student)  # the fourth step
    assert_close(again.model.get_parameter(weight).mean(), torch.tensor(4.0))


def test_a_rollout(fit):
    metrics, _ = fit("--model.rollout", "examples.rollout.TeacherStart", "--model.rollout.init_args.tokens", 3)
    assert 1 <= float(metrics["train/response_tokens"]) <= 7


def test_the_student_goes_on_where_the_teacher_stops(tiny, tiny_teacher, batch):
    """Greedy: the teacher's own words first, then what the student says after them."""
    greedy = Sampling(max_new_tokens=3, temperature=0.0)
    student, teacher = Student.load(ModelConfig(name=tiny)), FrozenTeacher(ModelConfig(name=tiny_teacher))
    teacher.setup(student, ModelConfig(name=tiny), torch.device("cpu"))
    rollout = TeacherStart(2, greedy)
    with rollout.active(student):
        found = rollout.generate(student, teacher, batch).responses
    starts = teacher.generate(batch, rollout.start, student.eos_ids, student.pad_id)
    for prompt, start, response in zip(batch.student_prompts, starts, found, strict=True):
        assert torch.equal(response[:2], start) and len(response) == 5
        begun = torch.cat([prompt, response])
        low = fast_dtype() == torch.bfloat16
        writer = student.plain(fast_dtype()).model
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=low):
            likeliest = writer(begun[None]).logits[0].argmax(-1)
        assert torch.equal(likeliest[len(prompt) + 1 : -1], response[2:])


def test_a_data_source(fit, tmp_path):
    file = tmp_path / "questions.csv"
    file.write_text('question,answer\n"How much is 1, and 1?",2\nWho?,Odalys\n')
    source = {"class_path": "examples.data_source.Csv", "init_args": {"file": str(file), "query": "question"}}
    _, config = fit("--data.train", json.dumps(source), "--data.batch_size", 2)
    assert config["data"]["train"]["init_args"]["file"] == str(file)
    rows = Csv(str(file), "question", "answer").examples("data.train")
    assert [(row.query, row.reference) for row in rows] == [("How much is 1, and 1?", "2"), ("Who?", "Odalys")]
    assert [row.source for row in rows] == [f"{file}:2", f"{file}:3"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no file"),
        ("query\n", "has no rows"),
        ("prompt\nWho?\n", "has no column 'query'"),
        ("query\n \n", ":2: "),
    ],
)
def test_what_it_cannot_read_is_named(tmp_path, text, said):
    file = tmp_path / "rows.csv"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=said):
        Csv(str(file)).examples("data.train")


def test_an_environment(fit):
    metrics, config = fit(
        *("--data.train", json.dumps(DOORS), "--model.rollout", "opcd.games.GameRollout"),
        *("--model.rollout.init_args.rollout", "StudentRollout"),
        *("--model.rollout.init_args.rollout.init_args.sampling.max_new_tokens", 4),
    )
    assert config["model"]["rollout"]["class_path"] == "opcd.games.GameRollout"
    assert float(metrics["train/response_tokens"]) <= 4


def test_each_is_described_with_a_command():
    for file in (ROOT / "examples").glob("*.py"):
        assert f"examples.{file.stem}." in file.read_text().split('"""')[1], file


@pytest.mark.parametrize(
    ("words", "recorded"),
    [
        (("--model.loss", "examples.loss.Renyi", "--model.loss.init_args.alpha", 0.3), True),
        (("--model.teacher", "examples.teacher.SnapshotTeacher", "--model.teacher.init_args.every_n_steps", 1), False),
        (("--model.rollout", "examples.rollout.TeacherStart", "--model.rollout.init_args.tokens", 3), False),
    ],
    ids=["loss", "teacher", "rollout"],
)
def test_every_command_takes_what_is_not_of_the_package(words, recorded, opcd, tiny, rows, context, tmp_path):
    """A loss, a teacher and a rollout of the user's own: no command looks for the classes of opcd."""
    common = ("--model.student.name", tiny, "--data.train", rows, "--data.val", rows, "--data.context", context)
    runs = ("--trainer.default_root_dir", tmp_path / "runs")
    short = ("--model.rollout.init_args.sampling.max_new_tokens", 2)
    code, text = opcd("validate", *common, *runs, *words, *short)
    assert code == 0 and "val/divergence" in text, text
    code, text = opcd("doctor", "--plan", *common, *words, *short)
    assert code == 0 and "peak" in text, text
    config = {str(name).removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    base = {str(name).removeprefix("--"): str(value) for name, value in zip(common[::2], common[1::2], strict=True)}
    sweep = {"base": {"set": base | config}, "axes": {"seed_everything": [0, 1]}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    code, text = opcd("sweep", tmp_path / "sweep.yaml", "--out", tmp_path / "out", "--dry_run")
    assert code == 0, text
    writes = () if "--model.rollout" in words else ("--model.rollout", "TeacherRollout")
    code, text = opcd("record", *common, *words, *writes, *short, "--out", tmp_path / "record")
    assert (code, "opcd record needs" in text) == ((0, False) if recorded else (2, True)), text
