"""Response positions: what `last_hidden` selects equals each row run alone, in both views."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from opcd.models import ModelConfig, load_model
from opcd.modules import Student
from opcd.modules.lm.hidden_states import check_head, head_of, last_hidden
from opcd.modules.trajectories import Trajectories
from opcd.runtime.errors import UserError

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def trajectories(batch):
    generator = torch.Generator().manual_seed(0)
    responses = [torch.randint(5, 1000, (n,), generator=generator) for n in (4, 1, 9, 3, 2, 7, 5, 6)]
    return Trajectories.of(batch, responses, {2})


@pytest.mark.parametrize("view", ["student_prompts", "teacher_prompts"])
def test_states_equal_those_of_each_row_alone(tiny, trajectories, view):
    model = load_model(ModelConfig(name=tiny), torch.float32)
    hidden = last_hidden(model, getattr(trajectories, view), trajectories.responses)
    logits = head_of(model)(hidden).split(trajectories.lengths.tolist())
    for row, (prompt, response) in enumerate(zip(getattr(trajectories, view), trajectories.responses, strict=True)):
        alone = model(torch.cat([prompt, response])[None]).logits[0]
        # The logits at position i predict token i + 1: the first that counts stands on the last prompt token.
        assert_close(logits[row], alone[len(prompt) - 1 : -1], rtol=1e-4, atol=1e-4)


def test_both_views_score_the_same_tokens(tiny, trajectories):
    student = Student.load(ModelConfig(name=tiny))
    one = last_hidden(student.model, trajectories.student_prompts, trajectories.responses)
    two = last_hidden(student.model, trajectories.teacher_prompts, trajectories.responses)
    assert len(one) == len(two) == int(trajectories.lengths.sum())


@pytest.mark.parametrize(
    "model",
    [
        Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=2.0, initializer_range=0.5)),
        CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25, initializer_range=0.5)),
        GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0, initializer_range=0.5)),
    ],
    ids=lambda model: type(model).__name__,
)
def test_heads_with_soft_capping_and_scales(model):
    ids = torch.randint(1, 64, (1, 12))
    model.eval()
    ours = head_of(model)(model.base_model(ids).last_hidden_state[0])
    assert_close(ours, model(ids).logits[0], rtol=1e-5, atol=1e-5)
    check_head(model, "model.student.name")


def test_an_unknown_way_to_compute_logits_is_refused():
    model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0, initializer_range=0.5)).eval()
    model.config.logits_scaling = 1.0
    plain, model.forward = model.forward, lambda **kwargs: _scaled(plain(**kwargs))
    with pytest.raises(UserError, match=r"model\.student\.name: Granite"):
        check_head(model, "model.student.name")


def _scaled(output):
    output.logits = output.logits * 3
    return output
