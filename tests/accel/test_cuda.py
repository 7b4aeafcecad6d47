"""Packed rows on a GPU: two passes merged, against whole rows on a CPU; the kernel's calls on the meta device."""

import math
from collections import Counter

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opcd.accel import cuda
from opcd.accel.cuda import CUDAAccelerator, _Rows
from tests.helpers.families import make
from tests.helpers.small_models import FAMILIES, Teaches, packed_trajectories


def reference(query, key, value, queries, keys, causal, scale, window=None):
    """The definition, a sequence and a query at a time, in the type of the numbers."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    share = query.shape[1] // key.shape[1]
    results, sums = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    of_queries, of_keys = queries.ends.tolist(), keys.ends.tolist()
    for row in range(len(queries.lengths)):
        k, v = (x[of_keys[row] : of_keys[row + 1]].repeat_interleave(share, 1) for x in (key, value))
        for place in range(of_queries[row], of_queries[row + 1]):
            last = len(k) - (of_queries[row + 1] - place) + 1 if causal else len(k)
            first = 0 if window is None else max(0, last - window)
            scores = torch.einsum("hd,khd->hk", query[place], k[first:last]) * scale
            sums[:, place] = scores.logsumexp(-1)
            results[place] = torch.einsum("hk,khd->hd", scores.softmax(-1), v[first:last])
    return results, sums


@pytest.fixture
def gpu(monkeypatch):
    """Models of this CPU are treated as a GPU's, with the kernel's definition in its place; counts its calls."""
    calls = Counter()

    def counted(*arguments, **options):
        calls["flash"] += 1
        return reference(*arguments, **options)

    monkeypatch.setattr("opcd.accel._of_type", lambda kind: CUDAAccelerator())
    monkeypatch.setattr(cuda, "_can_run", lambda model: True)
    monkeypatch.setattr(cuda, "flash", counted)
    return calls


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_passes_are_those_of_whole_rows(family, dtype, error, gpu):
    torch.manual_seed(0)
    model, mixed = FAMILIES[family]().to(dtype), packed_trajectories()
    full = Teaches(model, "never").score(mixed, 4096)
    assert not gpu["flash"]
    fast = Teaches(model, "always")
    for most in (10, 4096):
        assert_close(fast.score(mixed, most).hidden, full.hidden, rtol=error, atol=error)
    assert gpu["flash"] >= 2 * model.config.get_text_config().num_hidden_layers


@pytest.mark.parametrize("window", [2, 7, 40, 1000])
def test_a_window_shorter_and_longer_than_the_prefix(window, gpu):
    torch.manual_seed(0)
    model = FAMILIES["mistral, sliding window"]()
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    mixed = packed_trajectories()
    full, fast = (Teaches(model, mode).score(mixed, 4096).hidden for mode in ("never", "always"))
    assert_close(fast, full, rtol=1e-5, atol=1e-5)


def test_the_first_keys_of_a_cartridge_stand_before_the_prefix(gpu):
    torch.manual_seed(0)
    query, own, prefix, cartridge = (torch.randn(1, 2, n, 8, dtype=torch.float64) for n in (6, 6, 5, 3))
    rows, module = _Rows([4, 2], torch.device("cpu")), torch.nn.Module()
    module.layer_idx = 0
    with_more = torch.cat([cartridge, own], 2)
    found, _ = cuda._attention([(prefix, prefix)], rows, module, query, with_more, with_more, None)
    joined = torch.cat([cartridge, prefix], 2)
    expected, _ = cuda._attention([(joined, joined)], rows, module, query, own, own, None)
    assert_close(found, expected, rtol=1e-12, atol=1e-12)
    whole = torch.cat([joined, own[:, :, :4]], 2)[0]
    scores = (query[0, :, 3] * whole.transpose(0, 1)).sum(-1).T / math.sqrt(8)
    assert_close(found[0, 3], (scores.softmax(-1)[..., None] * whole).sum(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", ["Gemma2", "GptOss", "DeepseekV3"])
def test_what_the_kernel_lacks_is_not_given_to_it(family, gpu):
    """Scores that are capped, a sink, keys and values that are kept compressed."""
    torch.manual_seed(0)
    model, mixed = make(family), packed_trajectories()
    if not model._supports_sdpa:
        model.set_attn_implementation("eager")
    full = Teaches(model, "never").score(mixed, 4096).hidden
    assert_close(Teaches(model).score(mixed, 4096).hidden, full, rtol=1e-4, atol=1e-4)
    assert not gpu["flash"]


@pytest.mark.parametrize(
    ("change", "value"), [("_attn_implementation", "eager"), ("head_dim", 12), ("head_dim", 264)], ids=str
)
def test_other_models_get_a_mask(change, value, monkeypatch):
    monkeypatch.setattr(cuda, "_can_run", lambda model: True)
    model = FAMILIES["llama"]()
    assert CUDAAccelerator().packs_rows(model)
    monkeypatch.setattr(model.config, change, value)
    assert not CUDAAccelerator().packs_rows(model)


@pytest.mark.parametrize(
    ("dtype", "autocast", "capability", "runs"),
    [
        (torch.bfloat16, False, (8, 0), True),
        (torch.float16, False, (9, 0), True),
        (torch.bfloat16, False, (7, 5), False),
        (torch.float32, False, (9, 0), False),
        (torch.float32, True, (9, 0), True),
    ],
)
def test_the_type_and_the_gpu_decide(dtype, autocast, capability, runs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    model = FAMILIES["llama"]().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert cuda._can_run(model) is runs


class Calls(TorchDispatchMode):
    """Counts the operators, and finds the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.largest = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        for one in result if isinstance(result, tuple) else (result,):
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.numel())
        return result


@pytest.mark.parametrize(("window", "calls"), [(None, 2), (64, 1)])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_kernel_is_called_on_a_gpu_without_a_mask(window, calls, autocast, monkeypatch):
    """Without numbers, on the meta device: a tensor of the CPU among them is an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: autocast)  # this build of torch knows no GPU
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    heads, groups, size, prefix, lengths = 8, 2, 16, 300, [100] * 4
    dtype = torch.float32 if autocast else torch.bfloat16
    module = torch.nn.Module()
    module.layer_idx = 0
    with Calls() as seen:
        query, keys, before = (
            torch.empty(1, count, tokens, size, dtype=dtype, device="meta")
            for count, tokens in ((heads, 400), (groups, 400), (groups, prefix))
        )
        rows = _Rows(lengths, torch.device("meta"))
        found, _ = cuda._attention([(before, before)], rows, module, query, keys, keys, None, None, window)
    assert found.shape == (1, 400, heads, size) and found.device.type == "meta" and found.dtype == torch.bfloat16
    assert seen.names["_flash_attention_forward"] == calls
    assert seen.largest == heads * 400 * size  # no tensor has all pairs of tokens, 400 x 700
