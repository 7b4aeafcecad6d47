"""Rollouts of several turns: model calls, rows of both views, and a training step over them."""

import pytest
import torch
from lightning import Trainer
from torch.testing import assert_close
from transformers import AutoTokenizer

from examples.environment import Doors
from opcd.data import ContextQueryDataModule
from opcd.games import FrozenLake, Game, GameRollout, GameSeeds
from opcd.losses import ReverseKL
from opcd.models import ModelConfig, load_model
from opcd.modules import Distiller, FrozenTeacher, MixedRollout, Sampling, StudentRollout, TeacherRollout
from opcd.modules.rollouts import student_rollout
from opcd.modules.student import Student
from opcd.modules.teachers import base as teacher_module
from tests.helpers.rows import LESSONS
from tests.helpers.training import KeepGradients

SHORT = Sampling(max_new_tokens=6)


@pytest.fixture
def student(roomy):
    return Student.load(ModelConfig(name=roomy))


@pytest.fixture
def teacher(roomy, student):
    frozen = FrozenTeacher()
    frozen.setup(student, ModelConfig(name=roomy), torch.device("cpu"))
    return frozen


@pytest.fixture
def calls(monkeypatch):
    """(who, rows) of each call of `generate`."""
    made = []
    for module, who in ((student_rollout, "student"), (teacher_module, "teacher")):

        def counted(model, prompts, *args, who=who, generate=module.generate, **options):
            made.append((who, len(prompts)))
            return generate(model, prompts, *args, **options)

        monkeypatch.setattr(module, "generate", counted)
    return made


@pytest.fixture
def scripted(monkeypatch, student):
    """A student that opens door after door; (rows, prompts) of each call."""
    made = []

    def replies(model, prompts, *args, **options):
        made.append(prompts)
        texts = [student.tokenizer.decode(prompt) for prompt in prompts]
        moves = [f"I try [{text.count('YOU: ') + 1}]<|im_end|>" for text in texts]
        return [torch.tensor(student.tokenizer(move)["input_ids"]) for move in moves]

    monkeypatch.setattr(student_rollout, "generate", replies)
    return made


def batch_of(data):
    return data.encode(data.examples("train"))


def sampled(rollout, student, teacher, batch):
    """A step's order of calls."""
    with rollout.active(student):
        return rollout.generate(student, teacher, batch)


def expected_prompts(tokenizer, queries):
    """Token ids of both views, by the chat template alone."""
    views = []
    for system in ([], [{"role": "system", "content": LESSONS}]):
        messages = [[*system, {"role": "user", "content": query}] for query in queries]
        views.append([tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages])
    return views


def test_as_many_calls_as_the_longest_game_has_turns(game_data, student, teacher, calls):
    """64 games of a real model, which never finds a door."""
    rows = sampled(GameRollout(StudentRollout(SHORT)), student, teacher, batch_of(game_data(Doors(), 64)))
    assert calls == [("student", 64)] * 5
    assert len(rows) == 64 * 5


def test_games_end_at_different_turns(game_data, student, teacher, scripted):
    batch = batch_of(game_data(Doors(), 64))
    rows = sampled(GameRollout(StudentRollout(SHORT)), student, teacher, batch)
    # Of the seeds 0 to 63, 22 have door 1, 21 door 2 and 21 door 3.
    assert [len(prompts) for prompts in scripted] == [64, 42, 21]
    replies = [student.tokenizer.decode(ids) for ids in rows.responses]
    assert replies == ["I try [1]<|im_end|>"] * 64 + ["I try [2]<|im_end|>"] * 42 + ["I try [3]<|im_end|>"] * 21
    assert rows.ended == [True] * 127


def test_rows_are_both_views_of_every_turn(game_data, roomy, student, teacher, scripted):
    rows = sampled(GameRollout(StudentRollout(SHORT)), student, teacher, batch_of(game_data(Doors(), 3)))
    start = (
        "You are playing a game, one move at a time. Its rules are not told: they show in what your moves lead to.\n\n"
        "Situation:\nGAME: Doors: [1], [2], [3]"
    )
    shut = [f"\nYOU: [{door}]\nGAME: Door {door} is shut." for door in (1, 2)]
    end = "\n\nWhat is your next move? End your answer with it in square brackets."
    queries = [start + end] * 3 + [start + shut[0] + end] * 2 + [start + shut[0] + shut[1] + end]
    own, with_lessons = expected_prompts(AutoTokenizer.from_pretrained(roomy), queries)
    assert [prompt.tolist() for prompt in rows.student_prompts] == own
    assert [prompt.tolist() for prompt in rows.teacher_prompts] == with_lessons
    prefix = rows.teacher_prefixes[0].tolist()
    assert LESSONS in student.tokenizer.decode(prefix)
    assert all(prompt[: len(prefix)] == prefix for prompt in with_lessons)


def test_rows_of_a_real_model_replay_as_its_games(game_data, roomy, student, teacher):
    """Whatever the model said: its replies, played again one by one, give the prompts of the rows."""
    data = game_data(FrozenLake(), 3)
    torch.manual_seed(1)
    rows = sampled(GameRollout(StudentRollout(SHORT)), student, teacher, batch_of(data))
    games = [Game(example) for example in data.examples("train")]
    queries, number = [], 0
    while running := [game for game in games if game.success is None]:
        for game in running:
            queries.append(game.question.query)
            game.take(student.tokenizer.decode(rows.responses[number], skip_special_tokens=True))
            number += 1
    own, with_lessons = expected_prompts(AutoTokenizer.from_pretrained(roomy), queries)
    assert number == len(rows) and [prompt.tolist() for prompt in rows.student_prompts] == own
    assert [prompt.tolist() for prompt in rows.teacher_prompts] == with_lessons


def test_the_teacher_plays_with_the_lessons(game_data, student, teacher, calls):
    rollout = GameRollout(TeacherRollout(SHORT))
    rows = sampled(rollout, student, teacher, batch_of(game_data(Doors(), 6)))
    assert calls == [("teacher", 6)] * 5 and len(rows) == 30


def test_who_moves_can_be_drawn(game_data, student, teacher, calls):
    mixed = MixedRollout([StudentRollout(SHORT), TeacherRollout(SHORT)], [0.5, 0.5])
    torch.manual_seed(0)
    rows = sampled(GameRollout(mixed), student, teacher, batch_of(game_data(Doors(), 16)))
    assert len(rows) == 80 == sum(count for _, count in calls)
    assert {who for who, _ in calls} == {"student", "teacher"}
    with pytest.raises(ValueError, match="put it inside the GameRollout"):
        MixedRollout([GameRollout(StudentRollout(SHORT)), TeacherRollout(SHORT)], [0.5, 0.5])


def test_a_step_averages_over_all_turns_of_all_games(game_data, roomy, tiny_teacher, tmp_path, monkeypatch):
    """The logged divergence and the gradient are those of a dense float64 loop over every move."""
    taken = []
    generate = GameRollout.generate

    def kept(self, *args):
        taken.append(generate(self, *args))
        return taken[-1]

    monkeypatch.setattr(GameRollout, "generate", kept)
    config, other = ModelConfig(name=roomy), ModelConfig(name=tiny_teacher, dtype="float32")
    rollout = GameRollout(StudentRollout(SHORT, "float32"))
    distiller = Distiller(config, FrozenTeacher(other), ReverseKL(), rollout, micro_batch_tokens=512)
    data = game_data(Doors(), 4)
    options = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=1,
        accelerator="cpu",
        default_root_dir=tmp_path,
        precision="32-true",
        callbacks=[kept_gradients := KeepGradients.of(distiller)],
        **options,
    )
    trainer.fit(distiller, datamodule=data)
    gradients = {name.removeprefix("model."): value for name, value in kept_gradients.found.items()}

    rows = taken[0]
    assert len(rows) == 20
    student, frozen = load_model(config, torch.float32), load_model(other, torch.float32)
    values = []
    for number, response in enumerate(rows.responses):
        logits = []
        for model, prompts in ((student, rows.student_prompts), (frozen, rows.teacher_prompts)):
            whole = torch.cat([prompts[number], response])[None]
            logits.append(model(whole).logits[0, len(prompts[number]) - 1 : -1].double().log_softmax(-1))
        values.append((logits[0].exp() * (logits[0] - logits[1].detach())).sum(-1))
    logged = float(trainer.callback_metrics["train/divergence"])
    assert logged == pytest.approx(float(torch.cat(values).mean().detach()), rel=1e-4)
    torch.stack([value.mean() for value in values]).mean().backward()
    for name, parameter in student.named_parameters():
        assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-4 * float(parameter.grad.abs().max()))


def test_a_real_step_trains_and_validates(lessons, roomy, tmp_path, opcd):
    seeds = "{class_path: opcd.games.GameSeeds, init_args: {environment: {class_path: opcd.games.FrozenLake}, "
    config = tmp_path / "games.yaml"
    config.write_text(f"""
model:
  student: {{name: {roomy}}}
  micro_batch_tokens: 2048
  rollout:
    class_path: opcd.games.GameRollout
    init_args:
      rollout: {{class_path: opcd.modules.StudentRollout, init_args: {{sampling: {{max_new_tokens: 4}}}}}}
data:
  train: {seeds}start: 0, count: 4}}}}
  val: {seeds}start: 100, count: 2}}}}
  context: {lessons}
  batch_size: 2
trainer:
  max_steps: 2
  accelerator: cpu
  enable_checkpointing: false
  default_root_dir: {tmp_path / "runs"}
""")
    code, text = opcd("fit", "--config", config)
    assert code == 0, text
    metrics = (tmp_path / "runs" / "version_0" / "metrics.csv").read_text()
    assert "train/divergence" in metrics and "val/divergence" in metrics
    assert "FrozenLake, seeds 0 to 3, at most 5 moves" in (tmp_path / "runs/version_0/student/README.md").read_text()
    code, text = opcd("fit", "--config", config, "--data.val.init_args.start", 3)
    assert code == 2 and "data.train and data.val share seed 3 of FrozenLake; give each its own" in text


def test_rows_that_are_no_games_are_refused(lessons, roomy, tmp_path, rows, opcd):
    words = ("fit", "--model.student.name", roomy, "--model.rollout", "opcd.games.GameRollout", "--data.train", rows)
    code, text = opcd(
        *words, "--data.context", lessons, "--trainer.max_steps", 1, "--trainer.default_root_dir", tmp_path / "runs"
    )
    assert code == 2 and "rows.jsonl:1: GameRollout plays games, and this row is not a game; set the source" in text


def test_a_window_must_hold_the_last_turn(game_data, tiny, lessons, tmp_path, opcd):
    """The first prompt of a game fits into 512 tokens, that of its fifth move does not."""
    seeds = "{class_path: opcd.games.GameSeeds, init_args: {environment: {class_path: opcd.games.FrozenLake}, "
    words = ("fit", "--model.student.name", tiny, "--data.train", f"{seeds}start: 0, count: 4}}}}")
    words = (
        *words,
        "--data.context",
        lessons,
        "--trainer.max_steps",
        1,
        "--trainer.default_root_dir",
        tmp_path / "runs",
    )
    code, text = opcd(*words, "--model.rollout", "opcd.games.GameRollout")
    assert code == 2 and "takes 512 tokens, but the longest prompt of data.train has" in text
    data = game_data(FrozenLake(), 8)
    added = GameRollout(StudentRollout(SHORT)).max_response_tokens(data, "train") - SHORT.max_new_tokens
    first = data.longest_student_prompt("train")
    longest = 0
    for example in data.examples("train"):
        game = Game(example)
        while game.success is None:
            longest = max(longest, len(data.views.student_prompt(game.question)))
            game.take("[right]" if len(game.turns) % 2 else "[left]")
    assert longest <= first + added <= longest + 500


def test_the_seeds_of_a_data_module_are_its_rows(lessons, roomy):
    data = ContextQueryDataModule(
        train=GameSeeds(Doors(), 7, 4), context=str(lessons), student=ModelConfig(name=roomy), batch_size=2
    )
    data.setup("fit")
    assert sorted(row.example.seed for rows in data.train_dataloader() for row in rows) == [7, 8, 9, 10]
