"""Failures of a step: values that are not finite (their effect on the weights: the drill), and out of memory."""

import json

import pytest
import torch

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, SelfTeacher, Student, StudentRollout, Trajectories
from opcd.modules.step.failures import BadSteps, OnNonfinite, is_out_of_memory, keep_batch, what_is_bad
from opcd.runtime.errors import StepAbandoned, UserError
from tests.helpers.training import KeepGradients, trainer

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
        steps.in_a_row = 0
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


@pytest.fixture
def fit(tmp_path, tiny, rows, context):
    """One step of a tiny student."""

    def run() -> None:
        distiller = Distiller(
            ModelConfig(name=tiny),
            SelfTeacher(),
            rollout=StudentRollout(Sampling(max_new_tokens=2)),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        )
        data = ContextQueryDataModule(train=str(rows), context=str(context), student=ModelConfig(name=tiny))
        trainer(tmp_path).fit(distiller, datamodule=data)

    return run


def too_much(*args: object, **kwargs: object) -> None:
    torch.empty(2**50)  # 4 PiB


@pytest.mark.parametrize(
    ("owner", "name", "kind", "message"),
    [
        (
            StudentRollout,
            "generate",
            StepAbandoned,
            "in a step's rollout .*lower data.batch_size, rows_at_a_time",
        ),
        (SelfTeacher, "score", StepAbandoned, "in a step's teacher .*lower model.micro_batch_tokens, data.max_context"),
        (Student, "score", StepAbandoned, "in a step's student .*model.gradient_checkpointing: true"),
        (torch.optim.SGD, "step", UserError, "in a step's optimizer .*smaller state"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_the_knob_is_named(monkeypatch, fit, owner, name, kind, message):
    monkeypatch.setattr(owner, name, too_much)
    with pytest.raises(UserError, match=f"out of memory {message}") as raised:
        fit()
    assert type(raised.value) is kind


def test_smaller_micro_batches_give_the_same_step(monkeypatch, tmp_path, tiny, rows, context):
    """Passes of more than 100 tokens fail, and the second that would not: the gradients are those of one pass."""
    score = Student.score

    def gradient(limit: int, **options: object) -> tuple[torch.Tensor, int]:
        fitted = []

        def limited(student, part):
            fitted.append(len(part) * part.longest <= limit)
            return too_much() if not fitted[-1] or (limit == 100 and sum(fitted) == 2) else score(student, part)

        monkeypatch.setattr(Student, "score", limited)
        torch.manual_seed(0)
        distiller = Distiller(ModelConfig(name=tiny), rollout=StudentRollout(Sampling(max_new_tokens=4)), **options)
        kept = KeepGradients.of(distiller)
        data = ContextQueryDataModule(train=str(rows), context=str(context), student=ModelConfig(name=tiny))
        one = trainer(tmp_path, steps=-1, max_epochs=1, limit_train_batches=1, callbacks=[kept])
        one.fit(distiller, datamodule=data)
        return torch.cat([value.flatten() for value in kept.found.values()]), distiller.micro_batch_tokens

    whole, tokens = gradient(4096, shrink_on_oom=True)
    assert tokens == 4096
    with pytest.warns(UserWarning, match=r"out of memory \(.*\): model.micro_batch_tokens is \d+ from here on"):
        parts, tokens = gradient(100, shrink_on_oom=True)
    assert tokens <= 100
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="out of memory in a step's student"), pytest.warns(UserWarning):
        gradient(1, shrink_on_oom=True)


@pytest.mark.case("GPU-B6")
@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:62"), True),  # vLLM's
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA Error: out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_one):
    assert is_out_of_memory(error) is is_one


def test_other_errors_stay_as_they_are(monkeypatch, fit):
    def broken(*args: object) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(Student, "score", broken)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        fit()
