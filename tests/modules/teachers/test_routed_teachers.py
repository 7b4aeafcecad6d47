"""Several teachers in one run: each row against its own, the whole run from YAML, and what is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from opcd.data import ContextQueryDataModule, DataSet, DataSets
from opcd.losses import ReverseKL
from opcd.models import ModelConfig, load_model
from opcd.modules import (
    Distiller,
    FrozenTeacher,
    MovingAverageTeacher,
    RecordedRollout,
    RecordedTeacher,
    RoutedTeachers,
    Sampling,
    SelfTeacher,
    TeacherRollout,
    Trajectories,
)
from opcd.modules.step.metrics import PhaseTimer, TokenMeans, step_metrics
from opcd.runtime.errors import UserError
from tests.helpers.rows import write_rows
from tests.helpers.training import (
    RESPONSES,
    dense_reference,
    gradients,
    greedily,
    relative_difference,
    trainer,
)

TONE = "Answer like a sailor of Quillhaven, in one short sentence, and never with a number in digits."


@pytest.fixture
def sets(tmp_path, context):
    """Five rows of one teacher and three of another, which has a context of its own."""
    rows = [{"query": f"What is {n} + {n}?", "response": text} for n, text in enumerate(RESPONSES)]
    tone = tmp_path / "tone.txt"
    tone.write_text(TONE)
    return [
        DataSet(str(write_rows(tmp_path / "maths.jsonl", rows[:5])), str(context), "maths"),
        DataSet(str(write_rows(tmp_path / "style.jsonl", rows[5:])), str(tone), "style"),
    ]


def routed(tiny, tiny_teacher):
    """Two frozen teachers of different widths."""
    config = {name: ModelConfig(name=folder, dtype="float32") for name, folder in (("m", tiny_teacher), ("s", tiny))}
    return RoutedTeachers({"maths": FrozenTeacher(config["m"]), "style": FrozenTeacher(config["s"])})


def module(sets, teacher, order=range(8)):
    """The data of `sets`, in an order in which the teachers' rows alternate."""
    data = ContextQueryDataModule(train=DataSets(sets), teacher=teacher.models, shuffle=False)
    data.setup("fit")
    data._examples["train"] = [data.examples("train")[row] for row in order]
    return data


@pytest.mark.parametrize(("reduction", "prefix"), [("token", "always"), ("sequence", "never")])
def test_a_step_is_the_weighted_sum_of_the_teachers(monkeypatch, tmp_path, sets, tiny, tiny_teacher, reduction, prefix):
    """Gradients and logged divergences against the definition, each row with its own teacher."""
    data = module(sets, routed(tiny, tiny_teacher), order=[5, 0, 1, 6, 2, 3, 7, 4])
    found = []
    for rows in (3, 8):
        size = {"micro_batch_tokens": rows * (data.longest_student_prompt("train") + 12)}
        options = {"rollout": RecordedRollout(), "reduction": reduction, "shared_prefix": prefix, **size}
        distiller = Distiller(ModelConfig(name=tiny), routed(tiny, tiny_teacher), ReverseKL(), **options)
        found.append(gradients(tmp_path, data, distiller))

    student = load_model(ModelConfig(name=tiny), torch.float32)
    folders = {"maths": tiny_teacher, "style": tiny}
    models = {name: load_model(ModelConfig(name=folder), torch.float32) for name, folder in folders.items()}
    batch = data.encode(data.examples("train"))
    trajectories = RecordedRollout().generate(distiller.student, distiller.teacher, batch)
    lengths, loss, nats = trajectories.lengths, 0.0, {"maths": [], "style": []}
    for row, name in enumerate(trajectories.teachers):
        mean = dense_reference(student, models[name], trajectories.select([row]), "reverse", "token")
        weight = lengths[row] / lengths.sum() if reduction == "token" else 1 / len(lengths)
        loss = loss + weight * mean
        nats[name].append((float(mean.detach()) * int(lengths[row]), int(lengths[row])))
    loss.backward()
    expected = {f"model.{key}": value.grad for key, value in student.named_parameters()}
    logged = distiller.trainer.callback_metrics
    for name, values in nats.items():
        total, count = (sum(column) for column in zip(*values, strict=True))
        assert float(logged[f"train/divergence/{name}"]) == pytest.approx(total / count, rel=1e-4)
    whole = sum(total for values in nats.values() for total, _ in values) / int(lengths.sum())
    assert float(logged["train/divergence"]) == pytest.approx(whole, rel=1e-4)
    assert relative_difference(found[0], expected) < 1e-5
    assert relative_difference(found[1], expected) < 1e-5


def test_one_batch_is_the_batches_of_both_teachers(monkeypatch, tmp_path, sets, tiny):
    """In float64, where rounding hides nothing: the teachers are the live student and its first average."""
    make = {"maths": SelfTeacher, "style": MovingAverageTeacher}

    def step(order, teacher):
        run = Distiller(ModelConfig(name=tiny), teacher, rollout=RecordedRollout(), reduction="token")
        return gradients(tmp_path, module(sets, teacher, order), run, precision="64-true")

    def both():
        return RoutedTeachers({name: cls() for name, cls in make.items()})

    lengths = [len(r) for r in module(sets, both()).encode(module(sets, both()).examples("train")).responses]
    parts = [step(range(5), both()), step(range(5, 8), both())]
    shares = [sum(lengths[:5]) / sum(lengths), sum(lengths[5:]) / sum(lengths)]
    summed = {name: shares[0] * parts[0][name] + shares[1] * parts[1][name] for name in parts[0]}
    assert relative_difference(step([7, 0, 5, 1, 2, 6, 3, 4], both()), summed) < 1e-6  # the average is float32


def test_each_row_is_answered_by_its_own_teacher(sets, tiny, tiny_teacher):
    teacher = routed(tiny, tiny_teacher)
    data = module(sets, teacher, order=[5, 0, 6, 1])
    distiller = Distiller(ModelConfig(name=tiny), teacher)
    distiller.trainer = trainer(None)
    distiller.configure_model()
    batch = data.encode(data.examples("train"))
    written = TeacherRollout(Sampling(max_new_tokens=5, temperature=0.0)).generate(distiller.student, teacher, batch)
    assert written.teachers == ["style", "maths", "style", "maths"]
    for row, name in enumerate(written.teachers):
        response = written.responses[row]
        expected = greedily(teacher.teachers[name].model, batch.teacher_prompts[row], len(response))
        assert response.tolist() == expected


def test_means_over_ranks_leave_out_what_no_rank_has():
    ranks = [TokenMeans(), TokenMeans()]
    ranks[0].add({"divergence": torch.tensor([1.0, 2.0]), "divergence/a": torch.tensor([1.0, 2.0])})
    ranks[1].add({"divergence": torch.tensor([6.0]), "divergence/b": torch.tensor([6.0])})
    names, sums = ["divergence", "divergence/a", "divergence/b", "divergence/c"], []
    for rank in ranks:
        rank.over_ranks(names, lambda own: sums.append(own) or own)
    expected = {"divergence": 3.0, "divergence/a": 1.5, "divergence/b": 6.0}
    assert [rank.over_ranks(names, lambda own: sum(sums)) for rank in ranks] == [expected] * 2


def test_a_step_is_logged_under_the_same_names_on_every_rank(batch):
    """Where one rank lacks a value, Lightning would average it with the next one."""
    trajectories = Trajectories.of(batch, [torch.tensor([4, 5, 2])] * len(batch), {2})
    known = {"divergence": torch.ones(3), "student_entropy": torch.ones(3)}
    more = {"rollout_logprob_gap": torch.ones(2), "divergence/a": torch.ones(3)}
    clock = PhaseTimer(torch.device("cpu"))
    with clock("step"):
        ranks = [TokenMeans(), TokenMeans()]
    for means, values in zip(ranks, (known, more | known), strict=True):
        means.add(values)
    logged = [list(step_metrics(trajectories, means, clock, torch.tensor(1.0))) for means in ranks]
    assert logged[0] == logged[1] and "train/student_entropy" in logged[0]
    uneven = Distiller(teacher=RoutedTeachers({"a": SelfTeacher()})).uneven
    assert set(uneven) == {"divergence", "rollout_logprob_gap", "divergence/a"}


@pytest.fixture
def config(tmp_path, tiny, tiny_teacher, sets):
    """A config of two data sets and two teachers, as a dictionary."""
    frozen = {"class_path": "FrozenTeacher", "init_args": {"model": {"name": tiny_teacher}}}
    average = {"class_path": "MovingAverageTeacher", "init_args": {"decay": 0.5}}
    rollout = {"class_path": "TeacherRollout", "init_args": {"sampling": {"max_new_tokens": 5}}}
    data_sets = [vars(data_set) | {"teacher": name} for data_set, name in zip(sets, (None, "style"), strict=True)]
    return {
        "model": {
            "student": {"name": tiny},
            "teacher": {
                "class_path": "RoutedTeachers",
                "init_args": {"teachers": {"maths": frozen, "style": average}, "default": "maths"},
            },
            "rollout": rollout,
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            "eval_sampling": {"max_new_tokens": 2, "temperature": 0.0},
        },
        "data": {
            "train": {"class_path": "DataSets", "init_args": {"data_sets": data_sets}},
            "val": {"class_path": "opcd.data.DataSets", "init_args": {"data_sets": data_sets[::-1]}},
            "batch_size": 4,
        },
        "trainer": {"max_steps": 3, "default_root_dir": str(tmp_path / "runs"), "precision": "32-true"},
    }


@pytest.fixture
def fit(opcd, tmp_path):
    """Run `opcd fit` on a dictionary."""

    def run(config: dict, *more: object) -> tuple[int, str]:
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(config))
        return opcd("fit", "--config", file, *more)

    return run


def test_a_run_and_its_resumption(fit, opcd, config, tmp_path, tiny_teacher):
    code, text = fit(config)
    assert code == 0, text
    run = tmp_path / "runs" / "version_0"
    steps = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    for name in ("maths", "style"):
        assert any(row[f"train/divergence/{name}"] for row in steps)
        assert any(row[f"val/divergence/{name}"] for row in steps)
    card = (run / "student" / "README.md").read_text()
    assert f"maths: FrozenTeacher of {tiny_teacher}; style: MovingAverageTeacher |" in card
    assert "maths.jsonl" in card and "style.jsonl" in card
    saved = torch.load(run / "checkpoints" / "step=3.ckpt", weights_only=True)
    assert saved["teacher"].keys() == {"style"}

    config["trainer"]["max_steps"] = 2
    config["trainer"]["default_root_dir"] = str(tmp_path / "broken")
    assert fit(config)[0] == 0
    config["trainer"]["max_steps"] = 3
    code, text = fit(config, "--ckpt_path", "last")
    assert code == 0, text
    whole, resumed = (
        load_file(folder / "student" / "model.safetensors") for folder in (run, tmp_path / "broken" / "version_1")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_recorded_teachers(fit, opcd, config, tmp_path):
    """Responses and likeliest tokens of two teachers, from their records; a message names the one that is not there."""
    model, top = config["model"], {"inner": {"class_path": "opcd.losses.ForwardKL"}, "k": 8, "support": "teacher"}
    model["loss"] = {"class_path": "opcd.losses.TopK", "init_args": top}
    model["rollout"]["init_args"]["sampling"]["temperature"] = 0.0
    folder = str(tmp_path / "record")
    records = {name: {"class_path": "RecordedTeacher", "init_args": {"folder": folder}} for name in ("maths", "style")}
    model["teacher"]["init_args"]["teachers"] = records
    del config["data"]["val"]
    code, text = fit(config)
    assert code == 2 and "model.teacher.init_args.teachers.maths.init_args.folder: no record" in text

    single = json.loads(json.dumps(config))
    single["model"]["teacher"] = {"class_path": "FrozenTeacher", "init_args": {}}
    for data_set in single["data"]["train"]["init_args"]["data_sets"]:
        data_set["teacher"] = None
    file = tmp_path / "record.yaml"
    file.write_text(yaml.safe_dump(single))
    code, text = opcd("record", "--out", folder, "--k", 8, "--config", file)
    assert code == 0, text
    code, text = fit(config)
    assert code == 0, text


SINGLE = {"class_path": "SelfTeacher"}
NESTED = {"class_path": "RoutedTeachers", "init_args": {"teachers": {"a": SINGLE}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teachers": {}}, "RoutedTeachers needs teachers: a mapping"),
        ({"teachers": {"maths": NESTED, "style": SINGLE}}, "teachers.maths is itself RoutedTeachers"),
        ({"default": "mahts"}, "init_args.default: no teacher 'mahts'; did you mean maths?"),
        ({"default": None}, "maths.jsonl:1: no teacher: name one of maths, style"),
        ({"teachers": {"maths": SINGLE, "style": {"class_path": "BaseTeacher"}}}, "set model.adapter"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_refused_before_a_model_loads(fit, config, tmp_path, monkeypatch, change, message):
    monkeypatch.setattr("opcd.modules.student.load_model", lambda *_: pytest.fail("a model was loaded"))
    config["model"]["teacher"]["init_args"] |= change
    code, text = fit(config)
    assert code == 2, text
    assert text.count("opcd: error: ") == 1 and "Traceback" not in text
    assert message in text
    assert not list((tmp_path / "runs").glob("*"))


def test_a_teacher_column_beside_a_single_teacher(fit, config):
    config["model"]["teacher"] = SINGLE
    code, text = fit(config)
    assert code == 2 and "style.jsonl:1: teacher 'style' has no effect" in text


def test_messages_name_the_teacher(fit, config, tiny_teacher, tmp_path):
    """Its window, its vocabulary, and a model that is not there."""
    key = "model.teacher.init_args.teachers.style.init_args.model"
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(tiny_teacher).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    model = {"name": str(other)}
    config["model"]["teacher"]["init_args"]["teachers"]["style"] = {
        "class_path": "FrozenTeacher",
        "init_args": {"model": model},
    }
    settings = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 40}))
    code, text = fit(config)
    assert code == 2 and f"{key}.name: {other} takes 40 tokens" in text, text
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = list(vocabulary)[1000:1002]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, text = fit(config)
    assert code == 2 and f"choose model.student.name and {key}.name from one family" in text, text
    model["name"] = "org/not-there"
    code, text = fit(config)
    assert code == 2 and f"{key}.name: org/not-there" in text, text


def test_what_python_refuses(sets, recorded, tiny, tmp_path):
    with pytest.raises(ValueError, match="RecordedTeacher cannot be combined with other teacher types"):
        RoutedTeachers({"a": RecordedTeacher("folder"), "b": SelfTeacher()})
    teacher = RoutedTeachers({"a": SelfTeacher()}, default="a")
    with pytest.raises(UserError, match=r"data\.teacher: the data module knows of other teachers"):
        trainer(tmp_path).fit(
            Distiller(ModelConfig(name=tiny), teacher, rollout=RecordedRollout()), datamodule=recorded
        )
