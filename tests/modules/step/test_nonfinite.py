"""Numbers that are not finite: how the run is configured, and what is said. What happens to the weights: the drill."""

import json

import pytest
import torch

from opcd.modules.step.nonfinite import BadSteps, OnNonfinite, keep_batch, what_is_bad
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import StepAbandoned

FINE = {"divergence": 0.5, "student_entropy": 2.0, "teacher_entropy": 1.0}


def test_what_is_bad():
    assert what_is_bad(FINE, torch.tensor(3.0)) is None
    assert what_is_bad(FINE, torch.tensor(float("inf"))) == "not finite: the gradients"
    bad = FINE | {"divergence": float("nan"), "teacher_entropy": float("nan")}
    assert what_is_bad(bad, torch.tensor(float("nan"))) == "not finite: the teacher's states, the loss, the gradients"


def test_stop_and_skip(tmp_path):
    with pytest.raises(StepAbandoned, match=r"after 4 optimizer steps: p; the weights are unchanged"):
        BadSteps(OnNonfinite()).bad(4, "p", tmp_path)
    steps = BadSteps(OnNonfinite("skip", 2))
    with pytest.warns(UserWarning, match="The step is skipped"):
        for _ in range(2):
            steps.bad(4, "p", tmp_path)
        steps.good()
        for _ in range(2):
            steps.bad(5, "p", tmp_path)
    with pytest.raises(StepAbandoned, match="3 in a row"):
        steps.bad(5, "p", tmp_path)
    assert steps.total == 5


def test_an_option_without_effect():
    with pytest.raises(ValueError, match="no effect"):
        OnNonfinite("stop", 3)


def test_a_kept_batch_has_all_responses_of_a_game(tmp_path, batch):
    """A game has a row for every move: there may be more responses than rows of the data."""
    games = batch.select([0, 1])
    moves = [Trajectories.of(games, [torch.tensor([5, 6]), torch.tensor([7])], eos_ids={7}) for _ in range(2)]
    keep_batch(tmp_path / "new" / "bad.json", games, Trajectories.joined(moves), "p", {"divergence": float("nan")})
    kept = json.loads((tmp_path / "new" / "bad.json").read_text())
    assert [row["query"] for row in kept["rows"]] == [example.query for example in games.examples]
    assert [one["response_ids"] for one in kept["responses"]] == [[5, 6], [7]] * 2
    assert kept["responses"][3]["teacher_prompt_ids"] == games.teacher_prompts[1].tolist()
    assert (kept["problem"], kept["means"]) == ("p", {"divergence": "nan"})
