"""Anchors in a step: the loss and gradients by their definition, who teaches and writes them, whole runs."""

import csv
import json
from functools import partial

import pytest
import torch
from lightning import Callback
from safetensors.torch import load_file
from torch.testing import assert_close

from opcd.callbacks import RecoveryAndDrift
from opcd.data import Anchors, ContextQueryDataModule
from opcd.games import GameRollout
from opcd.losses import ReverseKL
from opcd.models import ModelConfig, load_model
from opcd.modules import (
    BaseTeacher,
    Distiller,
    FrozenTeacher,
    Lora,
    MovingAverageTeacher,
    RecordedRollout,
    RoutedTeachers,
    Sampling,
    SelfTeacher,
    StudentRollout,
    TeacherRollout,
)
from opcd.modules.teachers.anchored_teachers import with_anchors
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError
from tests.helpers.rows import write_rows
from tests.helpers.training import (
    RESPONSES,
    KeepGradients,
    dense_reference,
    greedily,
    relative_difference,
    trainer,
)

TOP = "{class_path: opcd.losses.TopK, init_args: {inner: {class_path: opcd.losses.ForwardKL}, k: 16, support: teacher}}"


@pytest.fixture
def data(tmp_path, context, tiny):
    """Five rows with a context and three anchors, in one batch."""
    rows = [{"query": f"What is {n} + {n}?", "response": text} for n, text in enumerate(RESPONSES)]
    files = [str(write_rows(tmp_path / name, part)) for name, part in (("r.jsonl", rows[:5]), ("a.jsonl", rows[5:]))]
    anchors = Anchors(0.375, files[1])
    return ContextQueryDataModule(
        train=files[0], context=str(context), anchors=anchors, shuffle=False, student=ModelConfig(name=tiny)
    )


class Moved(Callback):
    """Moves the student's weights before the first step: the anchors then have a divergence."""

    def on_train_start(self, trainer, distiller):
        moved(distiller.student.model)


@torch.no_grad()
def moved(model):
    generator = torch.Generator().manual_seed(7)
    for weight in model.parameters():
        weight.add_(torch.randn(weight.shape, generator=generator).to(weight) * 0.02)
    return model


@pytest.mark.parametrize(("reduction", "prefix"), [("token", "always"), ("sequence", "never")])
def test_a_step_is_by_the_definition(tmp_path, data, tiny, tiny_teacher, reduction, prefix):
    """Gradients and logged divergences: rows with a context by the teacher, anchors by the student's start."""
    data.setup("fit")
    for rows in (2, 8):
        taught = ModelConfig(name=tiny_teacher, dtype="float32")
        options = {"rollout": RecordedRollout(), "reduction": reduction, "shared_prefix": prefix}
        size = {"micro_batch_tokens": rows * (data.longest_student_prompt("train") + 12)}
        config = ModelConfig(name=tiny, dtype="float32")
        distiller = Distiller(config, FrozenTeacher(taught), ReverseKL(), **options, **size)
        kept = KeepGradients.of(distiller)
        trainer(tmp_path, callbacks=[kept, Moved()]).fit(distiller, data)

        student, start = moved(load_model(config, torch.float32)), load_model(config, torch.float32)
        batch = data.encode([*data.examples("train"), *data.examples("anchors")])
        assert batch.contexts[5:] == [None] * 3 and all(batch.contexts[:5])
        trajectories = RecordedRollout().generate(distiller.student, distiller.teacher, batch)
        lengths, loss, nats = trajectories.lengths, 0.0, {False: [], True: []}
        for row, name in enumerate(trajectories.teachers):
            model = start if name == "anchors" else load_model(taught, torch.float32)
            mean = dense_reference(student, model, trajectories.select([row]), "reverse", "token")
            weight = lengths[row] / lengths.sum() if reduction == "token" else 1 / len(lengths)
            loss = loss + weight * mean
            nats[name == "anchors"].append((float(mean.detach()) * int(lengths[row]), int(lengths[row])))
        loss.backward()
        expected = {f"model.{key}": value.grad for key, value in student.named_parameters()}
        assert relative_difference(kept.found, expected) < 1e-4
        logged = distiller.trainer.callback_metrics
        for name, values in {"train/divergence": nats[False], "train/divergence/anchors": nats[True]}.items():
            total, count = (sum(column) for column in zip(*values, strict=True))
            assert float(logged[name]) == pytest.approx(total / count, rel=1e-4)
        assert float(logged["train/divergence/anchors"]) > 0.01
        assert float(logged["train/response_tokens"]) == pytest.approx(
            int(lengths[:5].sum()) / 5
        )  # of the context's rows


@pytest.mark.parametrize(
    ("teacher", "adapter", "shared"),
    [
        (lambda tiny, other: FrozenTeacher(), None, True),
        (lambda tiny, other: FrozenTeacher(ModelConfig(name=tiny)), None, True),
        (lambda tiny, other: FrozenTeacher(ModelConfig(name=other)), None, False),
        (lambda tiny, other: SelfTeacher(), None, False),
        (lambda tiny, other: MovingAverageTeacher(), None, False),
        (lambda tiny, other: BaseTeacher(), Lora(rank=2), True),
        (lambda tiny, other: FrozenTeacher(ModelConfig(name=other)), Lora(rank=2), True),
    ],
)
def test_the_students_start_teaches_anchors(tmp_path, data, tiny, tiny_teacher, teacher, adapter, shared):
    """Whatever teaches the context, and with no more memory where the start is there already."""
    main = teacher(tiny, tiny_teacher)
    rollout = StudentRollout(Sampling(max_new_tokens=3))
    optimizer = partial(torch.optim.SGD, lr=0.05)
    distiller = Distiller(ModelConfig(name=tiny), main, rollout=rollout, adapter=adapter, optimizer=optimizer)
    trainer(tmp_path, steps=2).fit(distiller, data)
    start = distiller.teacher.parts["anchors"].model
    there = [part.model for name, part in distiller.teacher.parts.items() if name is None] + [distiller.student.model]
    known = {weight.data_ptr() for model in there for weight in model.parameters()}
    assert all(weight.data_ptr() in known for weight in start.parameters()) == shared
    base = load_model(ModelConfig(name=tiny), torch.float32).state_dict()
    for name, weight in start.state_dict().items():
        assert_close(weight.float(), base[name])
    assert "anchors" not in distiller.teacher.state_dict()


def test_a_teacher_that_writes_writes_anchors_without_the_context(tmp_path, data, tiny, tiny_teacher):
    teacher = with_anchors(FrozenTeacher(ModelConfig(name=tiny_teacher)), ModelConfig(name=tiny), adapted=False)
    distiller = Distiller(ModelConfig(name=tiny), teacher)
    distiller.trainer = trainer(None)
    distiller.configure_model()
    data.setup("fit")
    batch = data.encode([*data.examples("anchors")[:1], *data.examples("train")[:2], *data.examples("anchors")[1:2]])
    written = TeacherRollout(Sampling(max_new_tokens=5, temperature=0.0)).generate(distiller.student, teacher, batch)
    assert written.teachers == ["anchors", None, None, "anchors"]
    for row, name in enumerate(written.teachers):
        prompt = batch.student_prompts[row] if name else batch.teacher_prompts[row]
        expected = greedily(teacher.teachers[name].model, prompt, len(written.responses[row]))
        assert written.responses[row].tolist() == expected


def test_several_teachers_keep_their_figures(tmp_path, context, tiny):
    rows = [{"query": f"What is {n}?", "response": text, "teacher": "ab"[n % 2]} for n, text in enumerate(RESPONSES)]
    files = [
        write_rows(tmp_path / "r.jsonl", rows),
        write_rows(tmp_path / "a.jsonl", [{"query": "a", "response": "b"}]),
    ]
    teacher = RoutedTeachers({"a": SelfTeacher(), "b": MovingAverageTeacher()})
    options = {"teacher": teacher.models, "anchors": Anchors(0.2, str(files[1])), "batch_size": 10}
    data = ContextQueryDataModule(train=str(files[0]), val=str(files[0]), context=str(context), **options)
    distiller = Distiller(ModelConfig(name=tiny), teacher, rollout=RecordedRollout())
    run = trainer(tmp_path, steps=1)
    run.fit(distiller, data)
    names = {f"train/divergence{name}" for name in ("", "/a", "/b", "/anchors")}
    assert {name for name in run.callback_metrics if name.startswith("train/divergence")} == names
    run.validate(distiller, data, verbose=False)
    assert {name for name in run.callback_metrics if name.startswith("val/divergence")} == {
        f"val/divergence{name}" for name in ("", "/a", "/b")
    }
    trainer(tmp_path, steps=1).fit(distiller, data)  # once more, in a notebook


def test_they_hold_other_answers(tmp_path, rows, context, tiny):
    """As many rows with the context in each step, with anchors beside them and without."""

    def drift(size, anchors):
        torch.manual_seed(0)
        measure = RecoveryAndDrift(queries=1, general_prompts=4, max_new_tokens=8)
        data = ContextQueryDataModule(train=str(rows), context=str(context), batch_size=size, anchors=anchors)
        options = {
            "rollout": StudentRollout(Sampling(max_new_tokens=8)),
            "optimizer": partial(torch.optim.AdamW, lr=3e-3),
        }
        trainer(tmp_path, steps=8, callbacks=[measure]).fit(Distiller(ModelConfig(name=tiny), **options), data)
        return measure.measured[-1].drift

    assert drift(8, Anchors(0.5)) < 0.8 * drift(4, None)


@pytest.fixture
def words(tiny, rows, context, tmp_path):
    return [
        *("--model.student.name", tiny, "--trainer.precision", "32-true", "--data.anchors.share", 0.3),
        *("--model.optimizer.class_path", "torch.optim.SGD", "--model.optimizer.init_args.lr", 0.1),
        *("--data.train", rows, "--data.context", context, "--data.batch_size", 4),
        *("--trainer.default_root_dir", tmp_path / "runs", "--model.eval_sampling.max_new_tokens", 2),
        *("--trainer.callbacks+", "RecoveryAndDrift", "--trainer.callbacks.general_prompts", 0),
        *("--trainer.callbacks.queries", 1, "--trainer.callbacks.max_new_tokens", 2),
    ]


def steps_of(run):
    with (run / "metrics.csv").open() as lines:
        return [row for row in csv.DictReader(lines) if row["train/divergence"]]


def test_a_run_and_its_resumption(opcd, words, tmp_path):
    words += ["--model.rollout.init_args.sampling.max_new_tokens", 4]
    code, text = opcd("fit", *words, "--trainer.max_steps", 7)
    assert code == 0, text
    run = tmp_path / "runs" / "version_0"
    assert all(row["train/divergence"] for row in steps_of(run))
    assert any(float(row["train/divergence/anchors"] or 0) > 0 for row in steps_of(run))
    assert "anchors: FrozenTeacher of" in (run / "student" / "README.md").read_text()
    words[words.index("--trainer.default_root_dir") + 1] = tmp_path / "broken"
    for steps in (3, 7):
        code, text = opcd("fit", *words, "--trainer.max_steps", steps, "--ckpt_path", "last")
        assert code == 0, text
    one, other = (load_file(folder / "student/model.safetensors") for folder in (run, tmp_path / "broken/version_1"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    code, text = opcd("fit", *words, "--trainer.max_steps", 8, "--ckpt_path", "last", "--data.anchors.share", 0.4)
    assert code == 2 and "these keys differ: data.anchors.share" in text


def test_a_recorded_teacher_has_the_start_beside_it(opcd, words, tmp_path, tiny_teacher):
    """The record has likeliest tokens, the start a distribution; a recording takes no notice of anchors."""
    sampling = "{max_new_tokens: 6, temperature: 0.0}"
    words += ["--model.rollout", "TeacherRollout", "--model.rollout.init_args.sampling", sampling, "--model.loss", TOP]
    record = tmp_path / "record"
    teacher = ["--model.teacher.init_args.model.name", tiny_teacher]
    code, text = opcd("record", "--out", record, "--k", 16, *words, *teacher)
    assert code == 0, text
    recorded = {"class_path": "RecordedTeacher", "init_args": {"folder": str(record)}}
    code, text = opcd("fit", *words, "--model.teacher", json.dumps(recorded), "--trainer.max_steps", 4)
    assert code == 0, text
    assert any(row["train/divergence/anchors"] for row in steps_of(tmp_path / "runs" / "version_0"))


def test_the_plan_counts_the_start(opcd, words, tiny_teacher):
    def teachers(*more):
        code, text = opcd("doctor", "--plan", "--json", *words, *more)
        assert code in (0, 1), text
        return json.loads(text[text.index("{") :])["parts"].get("teacher's weights", {"teacher": 0})["teacher"]

    other, without = ["--model.teacher.init_args.model.name", tiny_teacher], ["--data.anchors", "null"]
    own = teachers()
    assert own == teachers(*without)
    assert teachers(*other) == teachers(*other, *without) + own
    assert teachers("--model.teacher", "BaseTeacher", "--model.adapter.rank", 2) == 0


def test_what_is_refused(tmp_path, data, tiny, context):
    def refusal(**options):
        with pytest.raises(UserError) as raised:
            trainer(tmp_path).fit(Distiller(ModelConfig(name=tiny), **options), data)
        return str(raised.value)

    write_rows(tmp_path / "a.jsonl", [{"query": "Why?"}])
    assert "a.jsonl:1: no `response`, but model.rollout is RecordedRollout" in refusal(rollout=RecordedRollout())
    with pytest.raises(UserError, match=r"init_args\.shard: with data\.anchors, a rank whose rows are anchors"):
        validate(
            Run(Distiller(ModelConfig(name=tiny), FrozenTeacher(shard=True), shared_prefix="never"), data, ranks=2)
        )
    assert refusal(rollout=GameRollout()).startswith("data.anchors: GameRollout plays games")
    with pytest.raises(ValueError, match=r"teachers\.anchors: the teacher of data\.anchors has this name"):
        RoutedTeachers({"anchors": SelfTeacher()})
