"""Rows side by side behind one prefix that is there once, against a cache with the prefix in every row."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

from opcd.accel import packed_attention, shared_context
from opcd.accel.packed_attention import Packed, Scoring
from opcd.modules.lm import generation
from opcd.modules.lm.generation import Sampling, generate, joined_cache, one_prefix, shared_cache
from opcd.modules.prefix.prefix_cache import PrefixCache
from tests.helpers.families import make
from tests.helpers.small_models import FAMILIES, ids

PLAIN = ["llama", "qwen2", "qwen3"]
ENDS = {7, 11, 23, 42, 64, 77}


def model_of(family, dtype):
    torch.manual_seed(0)
    model = FAMILIES[family]() if family in FAMILIES else make(family)
    if not model._supports_sdpa:
        model.set_attn_implementation("eager")
    return model.to(dtype).eval()


def prefixes_of(model, queries=(3, 9, 1, 14)):
    """Prompts of one context, and its keys and values for each."""
    context = ids(30, seed=1)[0]
    prompts = [torch.cat([context, query]) for query in ids(*queries, seed=2)]
    encoded = PrefixCache("always").encoded(model, [context] * len(prompts), prompts)
    return prompts, encoded


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("family", [*PLAIN, "GptOss"])
def test_the_tokens_and_their_scores_are_those_of_whole_prompts(family, few, monkeypatch):
    """Drawn tokens, in float64: prompts of several lengths, and rows that end and leave."""
    if few:
        monkeypatch.setattr(packed_attention, "SCORES", 100)
    model = model_of(family, torch.float64 if family in PLAIN else torch.float32)
    window = family not in PLAIN
    if window:
        model.config.layer_types = ["full_attention"] * model.config.num_hidden_layers
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
    prompts, encoded = prefixes_of(model)
    assert one_prefix(model, encoded) is encoded[0]
    right, seen = generation.draw, []
    monkeypatch.setattr(generation, "draw", lambda scores: seen.append(scores.clone()) or right(scores))
    found = []
    for prefixes in (None, encoded):
        torch.manual_seed(1)
        found.append([row.tolist() for row in generate(model, prompts, Sampling(20), ENDS, 0, prefixes)])
    assert found[0] == found[1]
    assert len({len(row) for row in found[0]}) > 1  # a row has left
    whole, shared = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    for one, other in zip(whole, shared, strict=True):
        assert_close(one, other, rtol=1e-4 if window else 1e-9, atol=1e-4 if window else 1e-9)


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("why", ["a window", "two contexts", "one row", "compressed states", "none"])
def test_who_gets_the_prefix_in_every_row(why):
    family = {"a window": "mistral, sliding window", "compressed states": "DeepseekV3"}.get(why, "llama")
    model = model_of(family, torch.float32)
    _, encoded = prefixes_of(model, (5, 5) if why != "one row" else (5,)) if why != "one row" else ([], None)
    if why == "two contexts":
        _, (other, *_) = prefixes_of(model_of("qwen3", torch.float32))
        other.ids = other.ids[:-1]
        encoded = [encoded[0], other]
    if why == "one row":
        encoded = prefixes_of(model)[1][:1]
    assert (one_prefix(model, encoded) is not None) is (why == "none")


def test_the_prefix_is_not_copied(monkeypatch):
    """The cache holds own tokens only, and still says how many a new one follows."""
    model = model_of("llama", torch.float32)
    _, encoded = prefixes_of(model)
    shared, whole = shared_cache(encoded[0], 4), joined_cache(encoded)
    assert sum(layer.keys.numel() for layer in shared.layers) == 0 < sum(layer.keys.numel() for layer in whole.layers)
    assert shared.get_seq_length() == whole.get_seq_length() == 30
    shared.update(torch.ones(4, 2, 3, 8), torch.ones(4, 2, 3, 8), 0)
    assert shared.layers[0].keys.shape == (4, 2, 3, 8) and shared.get_seq_length() == 33
    assert shared.get_mask_sizes(1, 0) == (34, 0)
    monkeypatch.setattr(generation, "joined_cache", None)
    prompts, encoded = prefixes_of(model)
    assert len(generate(model, prompts, Sampling(2, temperature=0.0), {96}, 0, encoded)) == 4


def test_rows_at_a_time_are_counted_without_the_context(monkeypatch):
    model = model_of("llama", torch.float32)
    prompts, encoded = prefixes_of(model)
    asked = []
    monkeypatch.setattr(generation, "at_a_time", lambda model, rows, tokens, most: asked.append(tokens) or rows)
    for prefixes in (encoded, None):
        generate(model, prompts, Sampling(2, temperature=0.0), {96}, 0, prefixes)
    assert asked == [14 + 2, 30 + 14 + 2]


class Layer:
    layer_idx = 0


def attend(device, dtype, count, mask):
    """One layer: 3 rows of `count` queries with 6 own keys behind 20."""
    query, own, prefix = (
        torch.randn(*shape, 64, dtype=dtype, device=device) for shape in ((3, 8, count), (3, 2, 6), (1, 2, 20))
    )
    seen = torch.ones(3, 1, count, 6, dtype=torch.bool, device=device) if mask else None
    result = shared_context.attend(query, (own, own), (prefix[0], prefix[0]), seen, Packed([]), Scoring(0.125))
    return query, own, prefix, result


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("mask", [False, True])
def test_without_a_mask_all_keys_are_seen(count, mask):
    torch.manual_seed(0)
    query, own, prefix, result = attend("cpu", torch.float64, count, mask)
    keys = torch.cat([prefix.expand(3, -1, -1, -1), own], 2)
    right = torch.nn.functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
    assert_close(result, right.transpose(1, 2))


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_another_device(dtype, count):
    result = attend("meta", dtype, count, True)[-1]
    assert result.shape == (3, count, 8, 64) and result.dtype == dtype and result.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_on_cuda(dtype):
    """Low precision, added up in float32."""
    with FakeTensorMode():
        query, key = (torch.randn(2, n, 64, dtype=dtype, device="cuda") for n in (5, 7))
        scores = packed_attention.products(query, key, Scoring(0.5, softcap=3.0))
        assert scores.shape == (2, 5, 7) and scores.dtype == torch.float32 and scores.device.type == "cuda"


def test_padding_that_sees_nothing_of_its_row_stays_a_number():
    """What a place of padding holds reaches no other, unless it is not a number."""
    query, own, prefix = (torch.randn(*shape, 8) for shape in ((2, 4, 3), (2, 2, 3), (1, 2, 5)))
    seen = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    seen[0, :, 0, 5:] = False
    result, _ = shared_context._attention([(prefix, prefix)], Packed([]), Layer, query, own, own, seen)
    alone = torch.nn.functional.scaled_dot_product_attention(query[:1, :, :1], prefix, prefix, enable_gqa=True)
    assert_close(result[:1, :1], alone.transpose(1, 2))
    assert result.isfinite().all()
