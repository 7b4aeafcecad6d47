"""The training step: its gradient against a dense reference, micro-batches, and where gradient must not flow."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from opcd.accel.cpu.onednn_linear import FEWEST_STEPS
from opcd.losses import ForwardKL, ReverseKL, SampledReverseKL, TopK
from opcd.models import ModelConfig, load_model
from opcd.modules import (
    Distiller,
    FrozenTeacher,
    MixedRollout,
    MovingAverageTeacher,
    RecordedRollout,
    Sampling,
    SelfTeacher,
    StudentRollout,
    TeacherRollout,
)
from opcd.modules.lm.generation import generate
from opcd.modules.student import Student
from tests.helpers.hardware import needs_bfloat16
from tests.helpers.training import dense_reference, gradients, greedily, relative_difference, trainer


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("loss", "name"), [(ReverseKL(), "reverse"), (ForwardKL(), "forward")])
def test_gradient_equals_the_definition(monkeypatch, tmp_path, recorded, tiny, tiny_teacher, reduction, loss, name):
    config, teacher = ModelConfig(name=tiny), ModelConfig(name=tiny_teacher, dtype="float32")
    distiller = Distiller(config, FrozenTeacher(teacher), loss, RecordedRollout(), reduction=reduction)
    found = gradients(tmp_path, recorded, distiller, accelerator="auto")

    student, frozen = load_model(config, torch.float32), load_model(teacher, torch.float32)
    batch = recorded.encode(recorded.examples("train"))
    trajectories = RecordedRollout().generate(distiller.student, distiller.teacher, batch)
    dense_reference(student, frozen, trajectories, name, reduction).backward()
    expected = {f"model.{key}": value.grad for key, value in student.named_parameters()}
    assert relative_difference(found, expected) < 1e-5


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize(("prefix", "close"), [("never", 1e-12), ("auto", 1e-6)])
@pytest.mark.parametrize("rows", [1, 3])
def test_micro_batches_do_not_change_the_gradient(
    monkeypatch, tmp_path, recorded, tiny, reduction, rows, prefix, close
):
    """In float64, where rounding hides nothing. The live student is the teacher: it too is float64 then.

    What rows begin with gets the sum of their gradients before the norms' backward pass, which is in float32 always.
    """
    recorded.setup("fit")
    longest = recorded.longest_student_prompt("train") + 12
    runs = []
    for tokens in (rows * longest, 8 * longest):
        make = partial(Distiller, ModelConfig(name=tiny), SelfTeacher(), rollout=RecordedRollout())
        distiller = make(reduction=reduction, micro_batch_tokens=tokens, shared_prefix=prefix)
        runs.append(gradients(tmp_path, recorded, distiller, precision="64-true"))
    assert next(iter(runs[0].values())).dtype == torch.float64
    assert relative_difference(runs[0], runs[1]) < close


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_live_student_as_teacher_gets_no_gradient_of_its_own(monkeypatch, tmp_path, recorded, tiny, precision):
    """Its gradient equals that against a frozen copy: it is the same model, and only the student's side counts."""
    frozen = FrozenTeacher(ModelConfig(name=tiny, dtype="float32"))
    make = partial(Distiller, ModelConfig(name=tiny), rollout=RecordedRollout())
    options = {"precision": precision, "accelerator": "auto"}
    live, other = (gradients(tmp_path, recorded, make(teacher), **options) for teacher in (SelfTeacher(), frozen))
    assert all(float(value.abs().sum()) > 0 for value in live.values())
    assert relative_difference(live, other) < (1e-6 if precision == "32-true" else 5e-2)


def test_a_step_changes_the_student_and_not_the_teacher(tmp_path, recorded, tiny):
    distiller = Distiller(ModelConfig(name=tiny), FrozenTeacher(), rollout=RecordedRollout())
    trainer(tmp_path, steps=2).fit(distiller, datamodule=recorded)
    start = load_model(ModelConfig(name=tiny))  # in the type of a frozen model on this machine
    for before, after in zip(start.parameters(), distiller.teacher.model.parameters(), strict=True):
        assert torch.equal(before, after)
    assert any(
        not torch.equal(a.float(), b)
        for a, b in zip(start.parameters(), distiller.student.model.parameters(), strict=True)
    )
    assert {id(p) for p in distiller.parameters()} == {id(p) for p in distiller.student.parameters()}


def test_moving_average_follows_by_its_formula(tmp_path, recorded, tiny):
    teacher = MovingAverageTeacher(decay=0.75)
    optimizer = partial(torch.optim.SGD, lr=1.0)
    distiller = Distiller(ModelConfig(name=tiny), teacher, rollout=RecordedRollout(), optimizer=optimizer)
    trainer(tmp_path, steps=1).fit(distiller, datamodule=recorded)
    start = load_model(ModelConfig(name=tiny), torch.float32)
    trios = zip(start.parameters(), distiller.student.model.parameters(), teacher.model.parameters(), strict=True)
    for before, student, average in trios:
        assert_close(average.data, 0.75 * before.data + 0.25 * student.data)
    assert set(teacher.state_dict()) == {"model"}


def test_the_student_writes_without_the_context_and_the_teacher_with_it(tmp_path, batch, tiny):
    distiller = Distiller(ModelConfig(name=tiny), FrozenTeacher(ModelConfig(name=tiny, dtype="float32")))
    distiller.trainer = trainer(tmp_path)
    distiller.configure_model()
    student, teacher = distiller.student, distiller.teacher
    greedy = Sampling(max_new_tokens=6, temperature=0.0)
    rollout = StudentRollout(greedy, dtype="float32")
    with rollout.active(student):
        own = rollout.generate(student, teacher, batch)
    written = {
        "student": own,
        "teacher": TeacherRollout(greedy).generate(student, teacher, batch),
    }
    for name, prompts in (("student", batch.student_prompts), ("teacher", batch.teacher_prompts)):
        for prompt, response in zip(prompts, written[name].responses, strict=True):
            assert response.tolist() == greedily(student.model, prompt, len(response))
    assert [r.tolist() for r in written["student"].responses] != [r.tolist() for r in written["teacher"].responses]


class Writes(RecordedRollout):
    """Counts how many rows of each batch it is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def generate(self, student, teacher, batch):
        self.asked.append(len(batch))
        return super().generate(student, teacher, batch)


@pytest.mark.parametrize("draw", ["row", "batch"])
def test_a_mixture_draws_by_row_or_by_batch(recorded, tiny, draw):
    recorded.setup("fit")
    batch, student = recorded.encode(recorded.examples("train")), Student.load(ModelConfig(tiny))
    first, second = Writes(), Writes()
    mixed = MixedRollout([first, second], [0.25, 0.75], draw)
    torch.manual_seed(0)
    for _ in range(200):
        found = mixed.generate(student, FrozenTeacher(), batch)
        assert [r.tolist() for r in found.responses] == [r.tolist() for r in batch.responses]  # in their order
    assert abs(sum(first.asked) / (200 * len(batch)) - 0.25) < 0.1
    whole = set(first.asked + second.asked) == {len(batch)}
    assert whole == (draw == "batch")


def test_a_mixture_refuses_another_draw():
    with pytest.raises(ValueError, match="row or batch"):
        MixedRollout([Writes(), Writes()], [0.5, 0.5], "step")


def test_the_low_precision_copy_follows_the_master_weights(tiny):
    distiller = Distiller(ModelConfig(name=tiny))
    distiller.trainer = trainer(None)
    distiller.configure_model()
    rollout = StudentRollout(Sampling(max_new_tokens=4, temperature=0.0), dtype="bfloat16")
    with rollout.active(distiller.student):
        copied = rollout._copy
    with torch.no_grad():
        for weight in distiller.student.parameters():
            weight.add_(0.25)
    with rollout.active(distiller.student):
        assert rollout._copy is copied  # in place: nothing is allocated again
        for master, low in zip(distiller.student.model.parameters(), copied.parameters(), strict=True):
            assert torch.equal(master.to(torch.bfloat16), low)
    assert copied.model.rotary_emb.inv_freq.dtype == torch.float32


@needs_bfloat16
def test_packed_layers_take_the_memory_of_the_copys_own(batch, tiny):
    """While it writes, several times in a step if need be; the next step finds all weights again."""
    student = Student.load(ModelConfig(tiny))
    rollout = StudentRollout(Sampling(max_new_tokens=FEWEST_STEPS, temperature=0.0))
    written = []
    for _ in range(2):
        with rollout.active(student):
            empty = {name for name, w in rollout._copy.named_parameters() if not w.untyped_storage().nbytes()}
            layers = {name for name, module in student.model.base_model.named_modules() if type(module) is nn.Linear}
            assert empty == {f"model.{name}.weight" for name in layers}  # not the head: it is the embedding
            written += [rollout.generate(student, FrozenTeacher(), batch).responses for _ in range(2)]
    plain = StudentRollout(Sampling(max_new_tokens=FEWEST_STEPS - 1, temperature=0.0))
    with plain.active(student):
        written.append(plain.generate(student, FrozenTeacher(), batch).responses)
        assert all(weight.untyped_storage().nbytes() for weight in plain._copy.parameters())
    first = [[r.tolist()[: FEWEST_STEPS - 1] for r in responses] for responses in written]
    assert all(responses == first[0] for responses in first)


def test_a_copy_takes_no_memory_until_it_writes_again(batch, tiny):
    distiller = Distiller(ModelConfig(name=tiny), FrozenTeacher(ModelConfig(name=tiny)))
    distiller.trainer = trainer(None)
    distiller.configure_model()
    student, greedy = distiller.student, Sampling(max_new_tokens=4, temperature=0.0)
    kept, freed = (StudentRollout(greedy, dtype="bfloat16") for _ in range(2))
    for change in (0.0, 0.01):
        with torch.no_grad():
            for weight in student.parameters():
                weight.add_(change)
        with kept.active(student):
            first = [r.tolist() for r in kept.generate(student, distiller.teacher, batch).responses]
            with freed.active(student):
                second = [r.tolist() for r in freed.generate(student, distiller.teacher, batch).responses]
            assert first == second
            assert sum(weight.untyped_storage().nbytes() for weight in freed._copy.parameters()) == 0
    own = StudentRollout(greedy, dtype="float32")
    with own.active(student):
        assert own._copy is None
    assert all(weight.untyped_storage().nbytes() for weight in student.parameters())


def test_clipped_tokens_have_no_gradient_and_top_k_reports_its_mass(
    monkeypatch, tmp_path, recorded, tiny, tiny_teacher
):
    teacher = FrozenTeacher(ModelConfig(name=tiny_teacher))
    distiller = Distiller(ModelConfig(name=tiny), teacher, TopK(ReverseKL(), k=4), RecordedRollout(), max_nats=1e-6)
    found = gradients(tmp_path, recorded, distiller, accelerator="auto")
    assert all(float(value.abs().max()) == 0 for value in found.values())
    logged = distiller.trainer.callback_metrics
    assert float(logged["train/clipped"]) == 1.0
    assert 0 < float(logged["train/student_retained_mass"]) <= 1


@pytest.mark.parametrize(
    "arguments", [{"temperature": 0.0}, {"micro_batch_tokens": 0}, {"max_nats": -1.0}, {"gradient_clip_val": 0.0}]
)
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match=f"model.{next(iter(arguments))} must be a finite number greater than 0"):
        Distiller(**arguments)


def test_the_sampled_reverse_kl_looks_at_the_tokens_of_the_response(tmp_path, recorded, tiny, tiny_teacher):
    """Per-token values, and a gradient of them, from the tokens' own log-probabilities."""
    teacher = FrozenTeacher(ModelConfig(name=tiny_teacher, dtype="float32"))
    distiller = Distiller(ModelConfig(name=tiny), teacher, SampledReverseKL())
    recorded.setup("fit")
    distiller.trainer = trainer(tmp_path)
    distiller.configure_model()
    batch = recorded.encode(recorded.examples("train"))
    trajectories = RecordedRollout().generate(distiller.student, teacher, batch)
    states = distiller.student.score(trajectories), teacher.score(trajectories, 4096)
    found = distiller.objective(*states, trajectories)["divergence"]
    tokens = torch.cat(trajectories.responses)[:, None]
    ours, theirs = (s.head(s.hidden).log_softmax(-1).gather(-1, tokens)[:, 0] for s in states)
    assert_close(found, ours - theirs)
    weight = distiller.student.model.get_output_embeddings().weight
    expected = torch.autograd.grad(((ours - theirs).detach() * ours).sum(), weight, retain_graph=True)
    assert_close(torch.autograd.grad(found.sum(), weight), expected)


@pytest.mark.parametrize(
    ("loss", "rollout", "message"),
    [
        (SampledReverseKL(), RecordedRollout(), "RecordedRollout takes others"),
        (SampledReverseKL(), StudentRollout(Sampling(temperature=0.7)), "sampling.temperature to model.temperature"),
        (SampledReverseKL(), StudentRollout(Sampling(top_p=0.9)), "no top_p, top_k or options"),
        (SampledReverseKL(importance_clip=2.0), StudentRollout(), "importance_clip has no effect"),
    ],
)
def test_a_biased_sampled_reverse_kl_is_refused(loss, rollout, message):
    with pytest.raises(ValueError, match=message):
        Distiller(loss=loss, rollout=rollout)


def test_options_of_generate_are_honoured(tiny, batch):
    student, ends = Student.load(ModelConfig(name=tiny)), set(range(0, 49152, 2))
    for options, ended in (({}, True), ({"min_new_tokens": 24}, False)):
        sampling = Sampling(24, temperature=0.0, options=options)
        (response,) = generate(student.model, batch.student_prompts[:1], sampling, ends, student.pad_id)
        assert (len(response) < 24) is ended
