"""A failed allocation names the settings of the part of the step that asked for too much."""

import pytest
import torch

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import Distiller, Sampling, SelfTeacher, Student, StudentRollout
from opcd.runtime.errors import StepAbandoned, UserError
from tests.helpers.training import KeepGradients, trainer


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
        (StudentRollout, "generate", StepAbandoned, "in a step's rollout .*lower data.batch_size, or max_new_tokens"),
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


def test_other_errors_stay_as_they_are(monkeypatch, fit):
    def broken(*args: object) -> None:
        raise RuntimeError("the size of tensor a must match")

    monkeypatch.setattr(Student, "score", broken)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        fit()
