"""End tokens of student and teacher: compared on the first step's responses, merged in the loss where asked."""

import warnings

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from opcd.losses import ForwardKL, Head, RecordedTokens, RecordedTopK, TopK
from opcd.models import ModelConfig, load_model
from opcd.modules import Distiller, FrozenTeacher, RecordedRollout, SelfTeacher, Student, Trajectories
from opcd.modules.endings import Endings
from opcd.modules.lm.hidden_states import HiddenStates, Routed
from opcd.modules.trajectories import Trajectory
from opcd.modules.validation import Run, validate
from opcd.runtime.errors import UserError
from tests.helpers.training import gradients, relative_difference, trainer

BASE, CHAT = 0, 2  # <|endoftext|> and <|im_end|> of the packaged tokenizer


@pytest.fixture(scope="module")
def base_teacher(tiny_teacher, tmp_path_factory):
    """The other tiny model as a base model: it ends with <|endoftext|>."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_teacher), AutoTokenizer.from_pretrained(tiny_teacher)
    model.generation_config.eos_token_id, tokenizer.eos_token = BASE, "<|endoftext|>"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def distiller(tiny, teacher, loss=None, **options):
    frozen = FrozenTeacher(ModelConfig(name=teacher, dtype="float32"))
    return Distiller(ModelConfig(name=tiny), frozen, loss or ForwardKL(), RecordedRollout(), **options)


def test_a_teacher_with_another_end_token_is_told_after_the_first_step(tmp_path, recorded, tiny, base_teacher):
    with pytest.warns(UserWarning, match="the student ends a response with") as told:
        trainer(tmp_path, steps=2).fit(distiller(tiny, base_teacher), datamodule=recorded)
    ours = [str(one.message) for one in told if "merge_end_tokens" in str(one.message)]
    assert len(ours) == 1
    assert "with <|im_end|>, model.teacher with <|endoftext|>; where" in ours[0]
    assert "where 8 responses of the first step end" in ours[0]


def test_the_gradient_with_merged_end_tokens_is_that_of_the_summed_probabilities(
    tmp_path, recorded, tiny, base_teacher
):
    run = distiller(tiny, base_teacher, merge_end_tokens=True, reduction="token")
    found = gradients(tmp_path, recorded, run)  # a warning would be an error here

    student, teacher = (load_model(ModelConfig(name=name), torch.float32) for name in (tiny, base_teacher))
    trajectories = RecordedRollout().generate(run.student, run.teacher, recorded.encode(recorded.examples("train")))
    values = []
    for row in trajectories.rows:
        sides = []
        for model, prompt in ((teacher, row.teacher_prompt), (student, row.student_prompt)):
            logits = model(torch.cat([prompt, row.response])[None]).logits[0, len(prompt) - 1 : -1].double()
            p = logits.softmax(-1)
            ends = p[:, [BASE, CHAT]].sum(-1, keepdim=True)
            others = torch.cat([p[:, BASE + 1 : CHAT], p[:, CHAT + 1 :]], dim=-1)
            sides.append(torch.cat([ends, others], dim=-1).clamp(min=1e-300).log())
        values.append((sides[0].detach().exp() * (sides[0].detach() - sides[1])).sum(-1))
    torch.cat(values).mean().backward()
    expected = {f"model.{name}": weight.grad for name, weight in student.named_parameters()}
    assert relative_difference(found, expected) < 1e-5
    apart = gradients(tmp_path, recorded, distiller(tiny, tiny, reduction="token"))
    assert relative_difference(found, apart) > 0.1


@pytest.fixture
def student(tiny):
    return Student.load(ModelConfig(name=tiny))


def looked_at(student, rows, teacher=(BASE,), end=None, merged=False, said=HiddenStates):
    """What is told of responses at whose ends the models have these probabilities of both end tokens."""

    class Other(SelfTeacher):
        def end_ids(self, student):
            return set(teacher)

    class View:
        turn_end = end

    endings = Endings(student, Other(), {None: View()}, merged)
    prompt, responses = torch.tensor([5]), [torch.tensor([9, CHAT]) for _ in rows]
    sides = []
    for side in (0, 1):
        p = torch.full((2 * len(rows), 10), 0.01)  # what the tokens before the end have is not looked at
        p[1::2] = (1 - torch.tensor([sum(row[side]) for row in rows]))[:, None] / 8
        p[1::2, [BASE, CHAT]] = torch.tensor([row[side] for row in rows])
        sides.append(HiddenStates(p.clamp(min=1e-9).log(), Head(torch.eye(10))))
    if said is RecordedTopK:
        values, tokens = sides[1].hidden.topk(2)
        sides[1] = RecordedTopK(tokens, values)
    elif said is RecordedTokens:
        sides[1] = RecordedTokens(torch.cat(responses), torch.zeros(2 * len(rows)))
    elif said is Routed:
        sides[1] = Routed({None: (list(range(len(rows))), sides[1])})
    given = [Trajectory(prompt, prompt, prompt, response, ended=True) for response in responses]
    endings.add(*sides, Trajectories(given))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        endings.warn()
    return [str(one.message) for one in told]


OTHER = [((0.02, 0.9), (0.8, 0.0)), ((0.0, 0.96), (0.9, 0.02))]


@pytest.mark.parametrize("said", [HiddenStates, RecordedTopK, Routed])
def test_the_figures_of_models_that_end_with_different_tokens(student, said):
    (told,) = looked_at(student, OTHER, said=said)
    assert "the student gives <|endoftext|> 0.01 and <|im_end|> 0.93, model.teacher <|endoftext|> 0.85 and " in told
    assert "where 2 responses of the first step end" in told and "model.merge_end_tokens: true" in told
    assert looked_at(student, OTHER, teacher=(BASE, CHAT), said=said)  # the ids agree, and the models do not


def test_models_that_end_alike_are_not_told_of(student):
    alike = [((0.0, 0.9), (0.1, 0.5))] * 5
    assert looked_at(student, alike, teacher=(CHAT,)) == []
    assert looked_at(student, alike, teacher=(BASE, CHAT)) == []  # it may end with another token, and does not
    assert looked_at(student, OTHER, merged=True) == []
    assert looked_at(student, OTHER, teacher=(), said=RecordedTokens) == []  # nothing is known


def test_a_teacher_that_never_ends(student):
    never = [((0.0, 0.9), (0.0, 0.001))] * 4
    for merged in (False, True):
        (told,) = looked_at(student, never, teacher=(CHAT,), merged=merged)
        assert "the teacher would go on" in told and "does not name" in told
    assert looked_at(student, never[:3], teacher=(CHAT,)) == []  # too few to tell


def test_ids_that_differ_where_nothing_was_measured(student):
    (told,) = looked_at(student, OTHER, said=RecordedTokens)
    assert told.startswith("the student ends a response with <|im_end|>, model.teacher with <|endoftext|>. Set")
    assert looked_at(student, OTHER, said=RecordedTokens, merged=True) == []


def test_a_student_that_goes_on_after_the_end_of_its_turn(student):
    (told,) = looked_at(student, [((0.0, 0.9), (0.0, 0.9))] * 2, teacher=(CHAT,), end=9)
    name = student.tokenizer.convert_ids_to_tokens(9)
    assert told.startswith(f"2 of the first step's 2 responses go on after {name}, with which the chat template ends")
    assert "stops at <|im_end|> only" in told


def test_the_end_of_a_turn_is_read_from_the_template(recorded):
    recorded.setup("fit")
    assert recorded.views.turn_end == CHAT


def test_merged_end_tokens_without_effect(tmp_path, recorded, tiny, tiny_teacher):
    with pytest.raises(UserError, match=r"has no effect: both models end with <\|im_end\|> only"):
        trainer(tmp_path).fit(distiller(tiny, tiny_teacher, merge_end_tokens=True), datamodule=recorded)


def test_a_teacher_of_a_few_tokens_cannot_merge(tiny):
    class Few(SelfTeacher):
        provides = ("topk",)

    loss = TopK(ForwardKL(), 4, "teacher")
    with pytest.raises(UserError, match="merge_end_tokens: Few gives log-probabilities of a few tokens a position"):
        validate(Run(Distiller(ModelConfig(name=tiny), Few(), loss, merge_end_tokens=True)))
