"""Attention on a CPU against float64: values, gradients, whole models, and what it leaves to SDPA."""

import copy

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, FalconConfig

from opcd.accel.cpu import attention as cpu_attention
from opcd.accel.cpu.attention import NAME, attention, causal_attention, use_cpu_attention
from opcd.accel.packed_attention import attends_by_rows
from opcd.models import ModelConfig
from opcd.modules import Student
from tests.helpers.small_models import FAMILIES

SHAPES = {  # B, H, G, L, K, D, E
    "one block": (2, 4, 2, 5, 5, 8, 8),
    "several blocks, the last one short": (3, 6, 2, 150, 150, 16, 16),
    "no shared keys": (1, 3, 3, 70, 70, 8, 8),
    "one pair of keys and values for all": (2, 4, 1, 64, 64, 8, 8),
    "behind a prefix": (2, 4, 2, 70, 111, 8, 8),
    "values of another width": (2, 4, 2, 66, 66, 8, 12),
    "one query": (2, 4, 2, 1, 9, 8, 8),
}


def tensors(shape, dtype):
    rows, heads, groups, length, keys, size, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    shapes = (rows, length, heads, size), (rows, keys, groups, size), (rows, keys, groups, width)
    # as models have them: heads in the second place of a tensor whose memory has them in the third
    made = [torch.randn(s, generator=generator).to(dtype).transpose(1, 2) for s in shapes]
    return made, torch.randn(rows, length, heads, width, generator=generator).to(dtype)


def reference(query, key, value, scale=None):
    """With a mask, in the type of what it gets: [B, L, H, E]."""
    length, keys = query.shape[2], key.shape[2]
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)
    result = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return result.transpose(1, 2)


def with_gradients(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = function(*leaves)
    result.backward(upstream.to(result.dtype))
    return [result.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, close, scale):
    inputs, upstream = tensors(shape, dtype)
    ours = with_gradients(lambda *x: causal_attention(*x, scale), inputs, upstream)
    exact = with_gradients(lambda *x: reference(*x, scale), [x.double() for x in inputs], upstream)
    for mine, right in zip(ours, exact, strict=True):
        assert mine.dtype == dtype
        assert_close(mine.double(), right, rtol=close, atol=close)


@pytest.mark.parametrize("bias", [0.0, 20.0])  # on the keys, as in Qwen2: all scores are large
@pytest.mark.parametrize("shape", SHAPES)
def test_low_precision(shape, bias):
    """Within three roundings of bfloat16; torch's kernel loses 6 % of the queries' gradient to the bias."""
    (query, key, value), upstream = tensors(shape, torch.bfloat16)
    inputs = [query, key + bias, value]
    exact = with_gradients(reference, [x.double() for x in inputs], upstream)
    for mine, right in zip(with_gradients(causal_attention, inputs, upstream), exact, strict=True):
        assert (mine.double() - right).norm() < 3 * 2**-8 * right.norm() + 1e-12


def test_rows_come_in_parts(monkeypatch):
    inputs, upstream = tensors("several blocks, the last one short", torch.float64)
    whole = with_gradients(causal_attention, inputs, upstream)
    monkeypatch.setattr(cpu_attention, "SCORES", 2 * 6 * 64 * 150)
    assert [len(part[0]) for part in cpu_attention._by_rows(*inputs)] == [2, 1]
    for part, other in zip(with_gradients(causal_attention, inputs, upstream), whole, strict=True):
        assert_close(part, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_the_same(family, checkpointing):
    torch.manual_seed(0)
    theirs = FAMILIES[family]().train()
    ours = copy.deepcopy(theirs)
    use_cpu_attention(ours)
    assert ours.config._attn_implementation == NAME
    assert theirs.config._attn_implementation == "sdpa"
    if checkpointing:
        ours.activation_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(1, 97, (3, 70))
    losses = [model(ids, use_cache=False).logits.logsumexp(-1).mean() for model in (ours, theirs)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5)


def test_under_autocast_it_is_used_and_gives_its_type(monkeypatch):
    torch.manual_seed(0)
    model, used = FAMILIES["llama"](), []
    use_cpu_attention(model)
    monkeypatch.setattr(
        cpu_attention, "_forward", lambda *x, f=cpu_attention._forward: used.append(x[1].dtype) or f(*x)
    )
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randint(1, 97, (3, 9)), use_cache=False).logits.sum().backward()
    assert used == [torch.bfloat16] * model.config.num_hidden_layers


class Layer:
    """What transformers gives as the module."""

    is_causal, num_key_value_groups = True, 2


@pytest.mark.parametrize(
    ("length", "others"),
    [
        (5, {"attention_mask": torch.ones(1, 1, 5, 5, dtype=torch.bool)}),
        (5, {"dropout": 0.5}),
        (5, {"is_causal": False}),
        (5, {"position_bias": torch.zeros(1, 4, 5, 5)}),
        (1, {}),
    ],
)
def test_the_rest_is_left_to_sdpa(monkeypatch, length, others):
    asked = []
    monkeypatch.setattr(cpu_attention, "sdpa_attention_forward", lambda *x, **k: asked.append((x, k)) or (x[1], None))
    query, key = torch.randn(1, 4, length, 8), torch.randn(1, 2, length, 8)
    attention(Layer(), query, key, key, **{"attention_mask": None, "scaling": 0.5} | others)
    assert len(asked) == 1
    assert asked[0][1].pop("scaling") == 0.5
    assert [*asked[0][1]] == [name for name in others if name != "attention_mask"]


@torch.no_grad()
def test_falcon_keeps_its_own():
    """It takes SDPA by comparing the name; with another name its eager attention added a mask of booleans."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 97}
    model = AutoModelForCausalLM.from_config(FalconConfig(**sizes), attn_implementation="sdpa").eval()
    ids = torch.randint(3, 97, (2, 9))
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    expected = model(ids, attention_mask=mask).logits[:, 4:]
    use_cpu_attention(model)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 4:], expected)
    assert not attends_by_rows(model, "sdpa")


def test_a_student_has_it_and_its_export_does_not_say_so(tiny, tmp_path):
    student = Student.load(ModelConfig(name=tiny))
    assert student.model.config._attn_implementation == NAME
    student.save(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    eager = Student.load(ModelConfig(name=tiny, attention="eager"))
    assert eager.model.config._attn_implementation == "eager"
