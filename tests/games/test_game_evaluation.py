"""Success over seeds: exact figures of a scripted player, the command, and the callback."""

import json

import pytest
import torch

from examples.environment import Doors
from opcd.callbacks import LMEval
from opcd.evaluation import Evaluation, Evaluator
from opcd.evaluation import batched_answers as answering
from opcd.games import FrozenLake, GameSeeds
from opcd.models import ModelConfig
from opcd.modules.student import Student

DOORS = {"class_path": "examples.environment.Doors"}
SEEDS = {"class_path": "opcd.games.GameSeeds", "init_args": {"environment": DOORS, "start": 0, "count": 6}}


@pytest.fixture
def player(monkeypatch, roomy):
    """A student that says what a function makes of the prompt; the prompts of each call."""
    student, asked = Student.load(ModelConfig(name=roomy)), []

    def use(reply):
        def respond(student, views, prompts, *args):
            texts = [views.context_text(ids) for ids in prompts]
            asked.append(texts)
            return [torch.tensor(student.tokenizer(reply(text))["input_ids"]) for text in texts]

        monkeypatch.setattr(answering, "respond", respond)
        return student, asked

    return use


def evaluator(roomy, **options):
    chosen = {"tasks": ["doors"], "data": {"doors": GameSeeds(Doors(), 0, 6)}, "batch_size": 64} | options
    return Evaluator(Evaluation(**chosen), ModelConfig(name=roomy))


def test_figures_of_a_scripted_player(player, roomy):
    """It tries door 1, then an impossible one, then 2, then says nothing: door 3 is never found."""
    moves = ["[1]", "[9]", "[2]", "hm", "hm"]
    student, asked = player(lambda text: moves[text.count("YOU: ")] + "<|im_end|>")
    result = evaluator(roomy)(student)["doors"]
    assert [len(texts) for texts in asked] == [6, 4, 4, 2, 2]
    found = {name: metric.value for name, metric in result.metrics.items()}
    # Seeds 0 and 3: 1 turn. 1 and 4: 3 turns, one invalid. 2 and 5: 5 turns, three invalid. 18 turns in all.
    assert found["success"] == pytest.approx(4 / 6)
    assert found["invalid_moves"] == pytest.approx(8 / 18)
    assert found["turns"] == pytest.approx(3.0)
    lengths = [len(student.tokenizer(move)["input_ids"]) + 1 for move in moves]
    tokens = 6 * lengths[0] + 4 * lengths[1] + 4 * lengths[2] + 2 * lengths[3] + 2 * lengths[4]
    assert found["response_tokens"] == pytest.approx(tokens / 18)
    assert (found["cut_off"], result.n) == (0, 6)
    assert (result.metrics["success"].low, result.metrics["success"].high) == pytest.approx((0.30, 0.90), abs=0.01)
    row = result.rows[2]
    assert (row["seed"], row["success"], row["turns"], row["actions"]) == (2, False, 5, ["1", "9", "2", None, None])
    assert row["invalid_moves"] == [False, True, False, True, True]
    assert row["feedback"].endswith("no more than 5 moves are allowed.")


def test_a_perfect_player_of_the_lake(player, roomy):
    """It reads the board and takes the shortest way, which has four moves on every board."""

    def reply(text):
        board = [line for line in text.rpartition("Current Board:")[2].splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in board]
        return f"[{way(rows)[0]}]<|im_end|>"

    def way(rows):
        start = next((r, c) for r, row in enumerate(rows) for c, cell in enumerate(row) if cell == "P")
        paths = [(start, [])]
        while True:
            (r, c), moves = paths.pop(0)
            if rows[r][c] == "G":
                return moves
            for (dr, dc), move in (((0, 1), "right"), ((1, 0), "down"), ((0, -1), "left"), ((-1, 0), "up")):
                if 0 <= r + dr < 3 and 0 <= c + dc < 3 and rows[r + dr][c + dc] != "H":
                    paths.append(((r + dr, c + dc), [*moves, move]))

    student, asked = player(reply)
    seeds = {"doors": GameSeeds(FrozenLake(), 500, 64)}
    result = evaluator(roomy, data=seeds)(student)["doors"]
    assert [len(texts) for texts in asked] == [64] * 4
    assert [result.metrics[name].value for name in ("success", "invalid_moves", "turns")] == [1.0, 0.0, 4.0]


def test_the_context_is_in_every_prompt(player, roomy, lessons):
    student, asked = player(lambda text: "[1]<|im_end|>")
    evaluator(roomy, context=str(lessons))(student)
    assert all("Open one door after the other." in text for texts in asked for text in texts) and len(asked) == 5
    asked.clear()
    evaluator(roomy)(student)
    assert not any("Open one door after the other." in text for texts in asked for text in texts)


def test_batches_and_limits(player, roomy):
    student, asked = player(lambda text: "[1]<|im_end|>")
    shown = []
    evaluator(roomy, batch_size=2, limit=3)(student, lambda task, done: shown.append((task, done)))
    assert [len(texts) for texts in asked] == [2, 1] + [2] * 4
    assert sum(done for _, done in shown) == 3 and {task for task, _ in shown} == {"doors"}


def test_samples_of_games(player, roomy):
    student, _ = player(lambda text: "[1]<|im_end|>")
    metrics = evaluator(roomy, samples=2)(student)["doors"].metrics
    assert metrics["avg@2"].value == metrics["pass@2"].value == pytest.approx(1 / 3)


def test_what_the_command_writes(opcd, roomy, tmp_path):
    words = ("evaluate", "--model", roomy, "--tasks", "doors", "--data.doors", json.dumps(SEEDS))
    code, text = opcd(*words, "--max_new_tokens", 6, "--out", tmp_path / "out")
    assert code == 0, text
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(summary["tasks"]["doors"]["metrics"])[:3] == ["success", "invalid_moves", "turns"]
    settings = summary["settings"]["tasks"]["doors"]
    assert settings["data"] == "Doors, seeds 0 to 5, at most 5 moves"
    assert [settings[name] for name in ("temperature", "top_p", "top_k", "max_new_tokens")] == [0.7, 0.8, 20, 6]
    rows = [json.loads(line) for line in (tmp_path / "out" / "doors.jsonl").read_text().splitlines()]
    assert [row["seed"] for row in rows] == list(range(6)) and all(len(row["tokens"]) == row["turns"] for row in rows)
    code, text = opcd(*words, "--max_new_tokens", 6, "--against", tmp_path / "out")
    assert code == 0 and "+0.000" in text  # the same draws


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"class_path": "opcd.games.TextArena", "init_args": {"game": "FrozenLak"}}, "did you mean FrozenLake-v0"),
        ({"class_path": "opcd.games.FrozenLake", "init_args": {"holes": 9}}, "0 <= holes <= (size - 1)^2, got 3 and 9"),
    ],
)
def test_games_that_cannot_be_played(opcd, roomy, environment, message):
    seeds = SEEDS | {"init_args": SEEDS["init_args"] | {"environment": environment}}
    code, text = opcd("evaluate", "--model", roomy, "--tasks", "g", "--data.g", json.dumps(seeds))
    assert code == 2 and message in text and "Union" not in text and len(text.splitlines()) == 1


def test_a_task_that_is_neither(opcd, roomy):
    code, text = opcd("evaluate", "--model", roomy, "--tasks", "frozen_lake")
    assert code == 2 and "no task 'frozen_lake'" in text and "data.frozen_lake is opcd.games.GameSeeds" in text


def test_a_window_that_is_too_small(opcd, tiny):
    lake = {"environment": {"class_path": "opcd.games.FrozenLake"}, "start": 0, "count": 2}
    words = ("--data.g", json.dumps(SEEDS | {"init_args": lake}), "--max_new_tokens", 8)
    code, text = opcd("evaluate", "--model", tiny, "--tasks", "g", *words)
    assert code == 2 and "takes 512 tokens, but the longest prompt of g has" in text


def test_success_during_training(opcd, roomy, lessons, tmp_path):
    """The callback plays too, and training does not notice it."""
    train = {"class_path": "opcd.games.GameSeeds", "init_args": SEEDS["init_args"] | {"start": 100}}
    measured = {"tasks": ["doors"], "data": {"doors": SEEDS}, "max_new_tokens": 4}
    callback = {"class_path": f"opcd.callbacks.{LMEval.__name__}", "init_args": {"evaluation": measured}}
    player = {"class_path": "opcd.modules.StudentRollout", "init_args": {"sampling": {"max_new_tokens": 4}}}
    config = {
        "model": {
            "student": {"name": roomy},
            "rollout": {"class_path": "opcd.games.GameRollout", "init_args": {"rollout": player}},
        },
        "data": {"train": train, "context": str(lessons), "batch_size": 3},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_checkpointing": False},
    }
    weights = []
    for name, callbacks in (("without", []), ("with", [callback])):
        file = tmp_path / f"{name}.yaml"
        trainer = config["trainer"] | {"default_root_dir": str(tmp_path / name), "callbacks": callbacks}
        file.write_text(json.dumps(config | {"trainer": trainer}))
        code, text = opcd("fit", "--config", file)
        assert code == 0, text
        weights.append((tmp_path / name / "version_0" / "student" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    run = tmp_path / "with" / "version_0"
    assert "eval/doors/success" in (run / "metrics.csv").read_text().splitlines()[0]
    assert len((run / "eval" / "step=2-doors.jsonl").read_text().splitlines()) == 6
