"""Rows packed behind a prefix, on every device: own and shared keys in two parts, against one softmax over both."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from opcd.accel import packed_attention
from opcd.accel.packed_attention import Packed, Scoring, attend, blockwise, uses_flash
from tests.helpers.hardware import needs_gpu

LENGTHS, PREFIX, HEADS, GROUPS = [5, 1, 12, 7], 23, 4, 2


def tensors(dtype=torch.float64, width=8, of_values=8, prefix=PREFIX, device="cpu"):
    """Queries, own keys and values, those of the prefix: [heads, tokens, width]."""
    generator = torch.Generator().manual_seed(0) if device == "cpu" else None

    def normal(heads, tokens, width):
        drawn = torch.randn(tokens, heads, width, generator=generator, dtype=dtype, device=device)
        return drawn.transpose(0, 1)  # the layout of projections

    own, shared = ((normal(GROUPS, n, width), normal(GROUPS, n, of_values)) for n in (sum(LENGTHS), prefix))
    return normal(HEADS, sum(LENGTHS), width) * 2, own, shared


def reference(query, own, shared, scoring):
    """Row by row: the softmax over the prefix and the row's past, from its definition, in float64."""
    results, first = [], 0
    for length in LENGTHS:
        rows = slice(first, first + length)
        q = query[:, rows].double()
        k, v = (torch.cat([far, near[:, rows]], 1).double() for near, far in zip(own, shared, strict=True))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        scores = q @ k.mT * scoring.scale
        if scoring.softcap is not None:
            scores = scoring.softcap * (scores / scoring.softcap).tanh()
        distance = (k.shape[1] - length + torch.arange(length))[:, None] - torch.arange(k.shape[1])
        hidden = (distance < 0) | (distance >= (scoring.window or k.shape[1]))
        scores = scores.masked_fill(hidden, -torch.inf)
        if scoring.sink is not None:
            scores = torch.cat([scores, scoring.sink.double()[:, None, None].expand(-1, length, 1)], -1)
        weights = scores.softmax(-1)[..., : k.shape[1]]
        results.append((weights @ v).transpose(0, 1))
        first += length
    return torch.cat(results)


SCORINGS = {
    "plain": Scoring(8**-0.5),
    "another scale": Scoring(0.7),
    "capped": Scoring(0.7, softcap=2.0),
    "a sink": Scoring(0.5, sink=torch.tensor([0.3, -2.0, 4.0, 1.0])),
    "a window within a row": Scoring(0.5, window=4),
    "a window of one": Scoring(0.5, window=1),
    "a window into the prefix": Scoring(0.5, window=14),
    "a window before the prefix": Scoring(0.5, window=30),
    "a window beyond all": Scoring(0.5, window=99),
    "all": Scoring(0.5, softcap=3.0, window=10, sink=torch.tensor([0.3, -2.0, 4.0, 1.0])),
}


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]
)
def test_two_parts_are_one_softmax(dtype, tolerance, scoring, few, monkeypatch):
    if few:  # blocks of one to three queries
        monkeypatch.setattr(packed_attention, "SCORES", 3 * HEADS * PREFIX)
        monkeypatch.setattr(packed_attention, "MERGED", 4)
    given = tensors(dtype)
    result = attend(*given, Packed(LENGTHS), scoring)
    assert result.dtype == dtype
    assert_close(result.double(), reference(*given, scoring), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("part", ["own", "shared"])
def test_scores_far_apart(part):
    """One part has all the weight, and exp of a score would overflow."""
    query, own, shared = tensors()
    (own if part == "own" else shared)[0].mul_(400)
    result = attend(query, own, shared, Packed(LENGTHS), SCORINGS["plain"])
    assert_close(result, reference(query, own, shared, SCORINGS["plain"]))


def test_values_of_another_width():
    given = tensors(width=12, of_values=6)
    assert_close(attend(*given, Packed(LENGTHS), SCORINGS["plain"]), reference(*given, SCORINGS["plain"]))


def flash_by_definition(q, k, v, ends_q, ends_k, most_q, most_k, dropout, causal, debug, *, scale, **window):
    """What aten::_flash_attention_forward returns: packed results [Q, H, D], sums [H, Q]; aligned at the last keys."""
    for ends, x, most in ((ends_q, q, most_q), (ends_k, k, most_k)):
        assert ends.dtype == torch.int32 and int(ends[-1]) == len(x) and int(ends.diff().max()) == most
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and not dropout and not debug
    left, right = (window.get(f"window_size_{side}", -1) for side in ("left", "right"))
    assert right in (-1, 0)
    results, sums = [], []
    for (a, b), (c, d) in zip(*(zip(e.tolist(), e.tolist()[1:], strict=False) for e in (ends_q, ends_k)), strict=True):
        key, value = (x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        scores = q[a:b].transpose(0, 1) @ key.mT * scale
        distance = (torch.arange(b - a) + (d - c) - (b - a))[:, None] - torch.arange(d - c)
        hidden = ((distance < 0) if causal else torch.zeros_like(distance).bool()) | (
            distance > left if left >= 0 else False
        )
        scores = scores.masked_fill(hidden, -torch.inf)
        results.append((scores.softmax(-1) @ value).transpose(0, 1))
        sums.append(scores.logsumexp(-1))
    return torch.cat(results), torch.cat(sums, 1), None, None, None


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("sizes", [(8, 8), (12, 6)])
@pytest.mark.parametrize("scoring", [s for s in SCORINGS.values() if s.softcap is None])
def test_what_the_flash_kernel_is_given(scoring, sizes, monkeypatch):
    """The kernel by its definition in float64: offsets, alignment, windows, groups, padded widths, the merge."""

    class Ops:
        _flash_attention_forward = staticmethod(flash_by_definition)

    given = tensors(width=sizes[0], of_values=sizes[1])
    monkeypatch.setattr(packed_attention, "uses_flash", lambda *arguments: True)
    monkeypatch.setattr(torch.ops, "aten", Ops)
    found = attend(*given, Packed(LENGTHS), scoring)
    monkeypatch.undo()
    assert_close(found, reference(*given, scoring))


@pytest.fixture
def ampere(monkeypatch):
    """The GPU that is not there has the kernel."""
    monkeypatch.setattr(packed_attention, "has_flash", lambda device: device.type == "cuda")


class Calls(TorchDispatchMode):
    """Names and devices of all operations."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.names.append(func._schema.name)
        for x in result if isinstance(result, tuple) else [result]:
            if isinstance(x, torch.Tensor) and "attention" not in func.name():
                self.largest = max(self.largest, x.numel())
        return result


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [None, 10])
def test_on_cuda(dtype, window, ampere):
    """Shapes, devices and types on a GPU that is only thought of. Indexing would ask for its driver: none is used."""
    scoring, rows = Scoring(0.5, window=window), Packed(LENGTHS)
    with FakeTensorMode(), Calls() as calls:
        given = tensors(dtype, width=64, of_values=64, device="cuda")
        for _ in range(2):
            result = attend(*given, rows, scoring)
        assert result.shape == (sum(LENGTHS), HEADS, 64) and result.dtype == dtype and result.device.type == "cuda"
    flash = [name for name in calls.names if "_flash_attention_forward" in name]
    assert len(flash) == (2 if window else 4)
    assert calls.names.count("aten::cumsum") == (2 if window else 3)  # ends are made once, not in each of two layers


@needs_gpu
@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize(("width", "of_values"), [(8, 8), (64, 64), (12, 6), (128, 128)])
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_on_a_gpu(dtype, tolerance, scoring, width, of_values):
    """The kernel itself, beside float64 on the CPU."""
    query, own, shared = given = tensors(dtype, width, of_values)
    there = replace(scoring, sink=None if scoring.sink is None else scoring.sink.cuda())
    pairs = ([x.cuda() for x in pair] for pair in (own, shared))
    result = attend(query.cuda(), *pairs, Packed(LENGTHS), there).cpu()
    assert result.dtype == dtype
    assert_close(result.double(), reference(*given, scoring), rtol=tolerance, atol=tolerance)


@pytest.mark.case("GPU-S2")
@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
def test_on_another_device(scoring):
    """Plain products: everything is made on the tensors' device, float32 on a GPU too."""
    if scoring.sink is not None:
        scoring = replace(scoring, sink=scoring.sink.to("meta"))
    result = attend(*tensors(torch.float32, device="meta"), Packed(LENGTHS), scoring)
    assert result.device.type == "meta" and result.dtype == torch.float32
    assert result.shape == (sum(LENGTHS), HEADS, 8)


@pytest.mark.case("GPU-S2")
def test_nothing_has_the_size_of_all_pairs(monkeypatch):
    """Of scores, only a block of queries at a time."""
    monkeypatch.setattr(packed_attention, "SCORES", 100)
    with Calls() as calls:
        attend(*tensors(torch.float32, prefix=400), Packed(LENGTHS), SCORINGS["plain"])
    assert calls.largest <= GROUPS * 400 * 8  # the prefix's keys; all pairs are 40,000 for all heads


@pytest.mark.parametrize(
    ("change", "fits"),
    [({}, True), ({"width": 264}, False), ({"dtype": torch.float32}, False), ({"device": "cpu"}, False)],
)
def test_what_the_flash_kernel_takes(change, fits, ampere):
    with FakeTensorMode():
        query, (_, value), _ = tensors(
            **{"dtype": torch.bfloat16, "device": "cuda", "width": 64, "of_values": 64} | change
        )
        assert uses_flash(query, value, Scoring(1.0)) is fits
        assert not uses_flash(query, value, Scoring(1.0, softcap=2.0))


def test_all_keys_without_a_row_of_their_own():
    """Queries that see all keys: the prefix's part."""
    query, _, (key, value) = tensors()
    result, sums = blockwise(query, (key, value), [query.shape[1]], [PREFIX], False, Scoring(0.5))
    k, v = (x.repeat_interleave(2, 0) for x in (key, value))
    scores = query @ k.mT * 0.5
    assert_close(result, (scores.softmax(-1) @ v).transpose(0, 1))
    assert_close(sums, scores.logsumexp(-1))


@pytest.mark.parametrize(("capability", "has"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_the_gpus_that_have_the_kernel(capability, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    packed_attention.has_flash.cache_clear()
    assert packed_attention.has_flash(torch.device("cuda", 0)) is has
    assert not packed_attention.has_flash(torch.device("cpu"))
    packed_attention.has_flash.cache_clear()


class Layer:
    layer_idx = 0


def test_the_first_keys_of_a_cartridge_stand_before_the_prefix():
    """As a longer prefix does; queries of a wider type are used as they are."""
    query, own, shared = tensors(torch.float32)
    cartridge, prefix = ([x[None, :, part] for x in shared] for part in (slice(9), slice(9, None)))
    keys, values = (torch.cat([first, x[None]], 2) for first, x in zip(cartridge, own, strict=True))
    arguments = (Packed(LENGTHS), attend, Layer, query.double()[None], keys, values, None, 0.7)
    result, _ = packed_attention._attention([tuple(prefix)], *arguments)
    assert result.dtype == torch.float32
    assert_close(result[0].double(), reference(query, own, shared, Scoring(0.7)), rtol=1e-5, atol=1e-5)


def test_autocast_decides_the_type():
    """Products in bfloat16, as of a float32 model under the trainer's autocast."""
    query, own, shared = tensors(torch.float32)
    arguments = (Packed(LENGTHS), attend, Layer, *(x[None] for x in (query, *own)), None)
    with torch.autocast("cpu", torch.bfloat16):
        result, _ = packed_attention._attention([tuple(x[None] for x in shared)], *arguments)
    assert result.dtype == torch.bfloat16


def test_a_bias_by_position_is_refused():
    arguments = (Packed(LENGTHS), attend, Layer, None, None, None, None)
    with pytest.raises(ValueError, match="bias by position"):
        packed_attention._attention([], *arguments, position_bias=torch.zeros(1))
