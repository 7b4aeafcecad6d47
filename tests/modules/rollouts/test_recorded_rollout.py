"""Responses that are replayed: of the data, and of the student until its next refresh."""

import pytest
import torch

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import (
    Distiller,
    MixedRollout,
    RecordedRollout,
    Sampling,
    SelfTeacher,
    Student,
    StudentRollout,
    TeacherRollout,
    VLLMRollout,
    VLLMServer,
)
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError
from tests.helpers.rows import write_rows

SERVER = VLLMServer("http://localhost:1", "student", "weights")
GREEDY = StudentRollout(Sampling(6, temperature=0.0), dtype="float32")


@pytest.fixture
def student(tiny):
    return Student.load(ModelConfig(name=tiny))


def written(rollout, student, batch):
    """The responses of one step."""
    with rollout.active(student):
        return [response.tolist() for response in rollout.generate(student, SelfTeacher(), batch).responses]


def train(student, seed):
    """Other weights, as after a step of training."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)


def test_the_student_writes_anew_at_every_nth_step_and_not_before(student, batch):
    rollout, half = RecordedRollout(refresh_every_n_steps=3, rollout=GREEDY), [0, 1, 2, 3]
    live = []  # of the weights of each step
    for step in range(7):
        live.append(written(GREEDY, student, batch))
        assert step == 0 or live[step] != live[step - 1]
        if step in (0, 3):  # the first half comes, and is written with these weights
            assert written(rollout, student, batch.select(half)) == live[step][:4]
        elif step in (1, 4):  # the second half for the first time
            assert written(rollout, student, batch) == live[step - 1][:4] + live[step][4:]
        elif step in (2, 5):
            assert written(rollout, student, batch) == live[step - 2][:4] + live[step - 1][4:]
        else:
            assert written(rollout, student, batch) == live[step]
        train(student, step)


def test_held_out_responses_are_of_the_weights_as_they_are(student, batch):
    rollout = RecordedRollout(refresh_every_n_steps=4, rollout=GREEDY)
    first = written(rollout, student, batch)
    train(student, 0)
    state = rollout.state_dict()
    student.eval()
    now = written(rollout, student, batch)
    student.train()
    assert now == written(GREEDY, student, batch) != first
    assert rollout.state_dict() == state
    assert written(rollout, student, batch) == first


def test_a_query_has_one_response_until_the_next_refresh(student, batch):
    rollout = RecordedRollout(refresh_every_n_steps=2, rollout=StudentRollout(Sampling(6)))
    one, other, again = written(rollout, student, batch.select([0, 1, 0]))
    assert one == again != other
    assert written(rollout, student, batch.select([1, 0])) == [other, one]
    assert written(rollout, student, batch.select([1, 0])) != [other, one]


def test_recorded_responses_are_taken_until_the_first_refresh(student, tiny, context, tmp_path):
    rows = [{"query": "Who?", "response": "Odalys."}, {"query": "Who?", "response": "Quill."}, {"query": "Where?"}]
    file = write_rows(tmp_path / "some.jsonl", rows)
    data = ContextQueryDataModule(train=str(file), context=str(context), student=ModelConfig(name=tiny))
    data.setup("fit")
    batch = data.encode(data.examples("train"))
    rollout = RecordedRollout(refresh_every_n_steps=1, rollout=GREEDY)
    live = written(GREEDY, student, batch)
    recorded = [data.views.response_ids(text) for text in ("Odalys.", "Quill.")]
    assert written(rollout, student, batch) == [*recorded, live[2]]
    assert written(rollout, student, batch) == live
    assert rollout.max_response_tokens(data, "train") == max(6, *map(len, recorded))
    with pytest.raises(UserError, match=r"some\.jsonl:3: no `response`"):
        RecordedRollout().max_response_tokens(data, "train")


def test_a_state_holds_what_was_written_before_it(student, batch):
    """A checkpoint within a step is of the state before the step."""
    rollout = RecordedRollout(refresh_every_n_steps=2, rollout=StudentRollout(Sampling(6)))
    before = rollout.state_dict()
    first = written(rollout, student, batch)
    assert before == {"steps": 0, "written": {}}
    again = RecordedRollout(refresh_every_n_steps=2, rollout=StudentRollout(Sampling(6)))
    again.load_state_dict(rollout.state_dict())
    assert written(again, student, batch) == first
    assert written(again, student, batch) != first


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: RecordedRollout(refresh_every_n_steps=0), "at least 1, got 0"),
        (lambda: RecordedRollout(rollout=StudentRollout()), "no effect without refresh_every_n_steps"),
        (lambda: RecordedRollout(None, 9, TeacherRollout()), "TeacherRollout cannot write"),
        (lambda: RecordedRollout(None, 9, MixedRollout([GREEDY, TeacherRollout()], [0.5, 0.5])), "MixedRollout cannot"),
        (lambda: RecordedRollout(None, 9, VLLMRollout(SERVER, importance_clip=2.0)), "importance_clip has no effect"),
    ],
)
def test_what_has_no_effect_or_cannot_be_replayed(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_runs_that_cannot_replay(rows, context, tiny, recorded):
    data = ContextQueryDataModule(train=str(rows), context=str(context), batch_size=4, student=ModelConfig(name=tiny))
    data.setup("fit")

    def run(every, data=data, **options):
        distiller = Distiller(ModelConfig(name=tiny), rollout=RecordedRollout(refresh_every_n_steps=every))
        validate(Run(distiller, data, **options))

    run(3)
    with pytest.raises(UserError, match=r"2 steps of 4 rows are no more than one pass .* such as 6"):
        run(2)
    with pytest.raises(UserError, match="refresh_every_n_steps is for one rank"):
        run(3, ranks=2)
    recorded.setup("fit")
    run(1, recorded)  # the recorded responses are an effect
