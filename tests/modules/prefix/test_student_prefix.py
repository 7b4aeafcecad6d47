"""The student's rows that begin alike, against whole rows: states, gradients, and where they stay whole."""

import copy

import pytest
import torch
from torch.testing import assert_close

from opcd.accel.cpu import attention as cpu_attention
from opcd.accel.cpu.attention import use_cpu_attention
from opcd.modules import Student
from opcd.modules.lm.adapters import Lora, add_lora
from opcd.modules.trajectories import Trajectories, Trajectory
from tests.helpers.small_models import FAMILIES, WITHOUT, ids

SHARED, LENGTHS = 20, (5, 9, 3, 1)
SHARING = ["llama", "qwen2", "qwen3"]


def trajectories(shared=SHARED):
    """Four rows that begin with the same tokens; the last one's query is a single token."""
    start = ids(shared, seed=1)[0]
    prompts = [torch.cat([start, torch.tensor([10 + n]), query]) for n, query in enumerate(ids(*LENGTHS, seed=2))]
    responses = ids(6, 1, 12, 4, seed=3)
    views = zip(prompts, prompts, prompts, responses, strict=True)
    return Trajectories([Trajectory(*row) for row in views])


def student(family, mode="auto", checkpointing=False):
    torch.manual_seed(0)
    model = (FAMILIES | WITHOUT)[family]().train()
    use_cpu_attention(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    made = Student(model, None)
    made.share_beginnings(mode)
    return made


def seen(made, rows):
    """Tokens that the last layer's norm has seen in a pass with gradient, and the states."""
    counts = []
    hook = made.model.get_submodule(last_norm(made.model)).register_forward_hook(
        lambda module, args, result: counts.append(args[0].numel() // args[0].shape[-1])
    )
    hidden = made.score(rows).hidden
    hook.remove()
    return counts, hidden


def last_norm(model):
    return [name for name, _ in model.named_modules() if name.endswith(("norm", "norm_f", "final_layernorm"))][-1]


def learnt(made, rows):
    hidden = made.score(rows).hidden
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, *WITHOUT])
def test_states_and_gradients_are_those_of_whole_rows(family, checkpointing, recwarn):
    if checkpointing and family in WITHOUT:
        pytest.skip("whole rows in both")
    ours, theirs = (student(family, mode, checkpointing) for mode in ("auto", "never"))
    (hidden, gradients), (right, others) = (learnt(made, trajectories()) for made in (ours, theirs))
    assert_close(hidden, right, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        assert float((gradient - others[name]).norm()) <= 1e-5 * float(others[name].norm()) + 1e-6, name
    assert ours._rows._agrees is (True if family in SHARING else None)
    assert not [w for w in recwarn if "share their prefix" in str(w.message)]


@pytest.mark.parametrize("family", SHARING)
def test_the_layers_see_the_beginning_once(family):
    made, rows = student(family), trajectories()
    longest = max(len(p) + len(r) for p, r in zip(rows.student_prompts, rows.responses, strict=True))
    counts, _ = seen(made, rows)
    whole_of_two = 2 * max(len(p) + len(r) for p, r in zip(rows.student_prompts[:2], rows.responses[:2], strict=True))
    assert counts == [whole_of_two, whole_of_two - SHARED, 4 * longest - 3 * SHARED]
    assert seen(made, rows)[0] == [4 * longest - 3 * SHARED]


def test_several_responses_to_one_query():
    """All but the last token of the prompt is shared: its state predicts the response."""
    prompt = ids(30, seed=1)[0]
    rows = Trajectories([Trajectory(prompt, prompt, prompt, response, True) for response in ids(4, 7, 2)])
    (hidden, _), (right, _) = (learnt(student("llama", mode), rows) for mode in ("always", "never"))
    assert_close(hidden, right, rtol=1e-5, atol=1e-5)
    assert seen(student("llama", "always"), rows)[0] == [29 + 3 * (1 + 7)]


def test_under_autocast_it_is_as_close_to_float32_as_whole_rows():
    right, exact = learnt(student("llama", "never"), trajectories())
    far = []
    for mode in ("auto", "never"):
        made = student("llama", mode)
        with torch.autocast("cpu", torch.bfloat16):
            hidden, gradients = learnt(made, trajectories())
        total = torch.cat([(gradients[name] - exact[name]).flatten() for name in exact])
        far.append((float((hidden - right).norm()), float(total.norm())))
        assert made._rows._agrees is (mode == "auto")
    assert all(ours < 1.3 * whole for ours, whole in zip(*far, strict=True))


def test_with_an_adapter():
    made = student("llama")
    add_lora(made.model, Lora(rank=2))
    whole = copy.deepcopy(made)
    whole.share_beginnings("never")
    (hidden, gradients), (right, others) = (learnt(each, trajectories()) for each in (made, whole))
    assert made._rows._agrees is True
    assert_close(hidden, right, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert_close(gradient, others[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["few", "one row", "dropout", "eager", "never"])
def test_rows_stay_whole(why):
    made, rows = student("llama", "never" if why == "never" else "auto"), trajectories(8 if why == "few" else SHARED)
    if why == "one row":
        rows = rows.select([0])
    if why == "dropout":
        made.model.config.attention_dropout = 0.1
    if why == "eager":
        made.model.config._attn_implementation = "eager"
    longest = max(len(p) + len(r) for p, r in zip(rows.student_prompts, rows.responses, strict=True))
    assert seen(made, rows)[0] == [len(rows) * longest]


@pytest.mark.parametrize("wrong", ["differs", "fails"])
def test_a_model_that_cannot_is_told_once_and_computes_whole_rows(monkeypatch, wrong):
    def whole(x, rows, shared):
        if wrong == "fails":
            raise ValueError("no rows here")
        return right(x, rows, shared).flip(2)

    right = cpu_attention._whole
    monkeypatch.setattr(cpu_attention, "_whole", whole)
    made = student("llama")
    with pytest.warns(UserWarning, match="no rows here" if wrong == "fails" else "hidden states differ by"):
        hidden = made.score(trajectories()).hidden
    assert_close(hidden, student("llama", "never").score(trajectories()).hidden)
    assert made._rows._agrees is False
