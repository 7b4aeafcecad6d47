"""The decode loop beside transformers' own, its draws, and packed linear layers."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MistralConfig,
    TemperatureLogitsWarper,
)
from transformers.cache_utils import DynamicSlidingWindowLayer

from opcd.accel.cpu.onednn_linear import FEWEST_STEPS, _Joined, packed_linears
from opcd.modules.lm import generation
from opcd.modules.lm.generation import RoomyLayer, Sampling, draw, generate, give_room, own_precision
from tests.helpers.families import make
from tests.helpers.hardware import needs_bfloat16

PAD, STEPS = 2, 24
ENDS = set(range(0, 49152, 12))
"""So many tokens end a response that greedy rows of a random model end at various steps."""


@pytest.fixture(scope="module")
def model(tiny):
    return AutoModelForCausalLM.from_pretrained(tiny).eval()


@pytest.fixture(scope="module")
def prompts():
    draws = torch.Generator().manual_seed(0)
    return [torch.randint(100, 40000, (length,), generator=draws) for length in (5, 9, 3, 7, 6, 8, 4, 5)]


def batch_sizes(model, run):
    """Rows of every forward pass of the model within `run`, and its result."""
    sizes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    try:
        return sizes, run()
    finally:
        hook.remove()


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 9}])
def test_greedy_responses_are_those_of_each_prompt_alone(model, prompts, options):
    sampling = Sampling(STEPS, temperature=0.0, options=options)
    sizes, together = batch_sizes(model, lambda: generate(model, prompts, sampling, ENDS, PAD))
    for prompt, response in zip(prompts, together, strict=True):
        alone = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            generation_config=sampling.generation_config(ENDS, PAD),
        )
        assert torch.equal(response, alone[0, len(prompt) :])
    lengths = [len(response) for response in together]
    assert options.get("min_new_tokens", 1) <= min(lengths) < max(lengths)
    # pass t is for the rows that have more than t tokens
    assert sizes == [sum(length > step for length in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("length", [7, 8, 9])
@pytest.mark.parametrize(
    "processor",
    [
        MinLengthLogitsProcessor(9, [3, 5]),
        MinNewTokensLengthLogitsProcessor(4, 5, [3, 5]),
        TemperatureLogitsWarper(0.5),
    ],
)
def test_no_end_comes_too_early(processor, length):
    ids, scores = torch.zeros(2, length, dtype=torch.int64), torch.randn(2, 10)
    expected = processor(ids, scores)
    assert torch.equal(generation.NoEndBefore.of(processor)(ids, scores.clone()), expected)


def test_every_token_of_a_response_is_told_as_it_is_written(model, prompts):
    heard = [[] for _ in prompts]

    def told(rows, tokens):
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            heard[row].append(token)

    responses = generate(model, prompts, Sampling(STEPS, temperature=0.0), ENDS, PAD, told=told)
    assert heard == [response.tolist() for response in responses]


def test_rows_that_cannot_leave_end_the_loop_once_all_have_ended(model, prompts, monkeypatch):
    """What an ended row writes on does not count, and does not bring it back."""
    sampling, ends = Sampling(STEPS, temperature=0.0), set(range(0, 49152, 4))
    expected = generate(model, prompts, sampling, ends, PAD)
    longest = max(map(len, expected))
    assert min(map(len, expected)) < longest < STEPS
    monkeypatch.setattr(generation, "_can_leave", lambda inputs, rows: False)
    sizes, found = batch_sizes(model, lambda: generate(model, prompts, sampling, ends, PAD))
    assert sizes == [len(prompts)] * longest
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.filterwarnings("ignore")  # of transformers, about its slower kernels
def test_no_row_leaves_layers_that_keep_a_state_beside_keys_and_values():
    """transformers would take the row out of the keys and values alone."""
    torch.manual_seed(0)
    hybrid, ends = make("FalconH1"), set(range(0, 97, 4))
    prompts = [torch.randint(3, 97, (length,)) for length in (5, 9, 3, 7)]
    sampling = Sampling(STEPS, temperature=0.0)
    sizes, found = batch_sizes(hybrid, lambda: generate(hybrid, prompts, sampling, ends, 0))
    assert len({len(response) for response in found}) > 1 and set(sizes) == {len(prompts)}
    for prompt, response in zip(prompts, found, strict=True):
        assert torch.equal(generate(hybrid, [prompt], sampling, ends, 0)[0], response)


def test_a_rank_that_is_done_runs_on_until_all_are(model, prompts, monkeypatch):
    sampling, calls = Sampling(STEPS, temperature=0.0), []
    expected = generate(model, prompts, sampling, ENDS, PAD)
    longest = max(map(len, expected))

    def until_all_are(self, done, synced_gpus, device):
        calls.append(done)
        return len(calls) < longest + 5

    monkeypatch.setattr(type(model), "_has_unfinished_sequences", until_all_are)
    found = generate(model, prompts, sampling, ENDS, PAD)
    assert calls[-5:] == [True] * 5
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("steps", [3, 3 * RoomyLayer.MORE])
def test_a_cache_that_grows_in_place_holds_what_transformers_holds(steps):
    """Also where rows leave, where the last tokens are taken back, and where the room is used up."""
    torch.manual_seed(0)
    plain, roomy = DynamicCache(), DynamicCache()
    for cache in (plain, roomy):
        cache.update(torch.arange(60.0).view(3, 2, 5, 2), torch.arange(60.0).view(3, 2, 5, 2) + 0.5, 0)
    given = roomy.layers[0].keys
    give_room(roomy)
    assert isinstance(roomy.layers[0], RoomyLayer)
    places = set()
    for step in range(steps):
        if step == steps // 3:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor([0, 2]))
        if step == steps // 2:
            for layer in (plain.layers[0], roomy.layers[0]):
                layer.crop(-2)
        new = torch.randn(2, len(plain.layers[0].keys), 2, 1, 2)
        expected, found = (cache.update(new[0], new[1], 0) for cache in (plain, roomy))
        for one, other in zip(expected, found, strict=True):
            assert torch.equal(one, other)
        assert roomy.get_seq_length() == plain.get_seq_length()
        places.add(found[0].data_ptr())
    assert torch.equal(given, torch.arange(60.0).view(3, 2, 5, 2))  # what was given may be kept elsewhere
    assert len(places) <= 2 + steps // RoomyLayer.MORE


def test_layers_with_a_window_stay_as_they_are():
    cache = DynamicCache(config=MistralConfig(sliding_window=4, num_hidden_layers=2))
    for number in range(2):
        cache.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2), number)
    give_room(cache)
    assert [type(layer) for layer in cache.layers] == [DynamicSlidingWindowLayer] * 2


def test_draws_follow_the_distribution():
    torch.manual_seed(0)
    scores = torch.tensor([-torch.inf, 0.3, -1.0, 2.0, -torch.inf, 1.0, -torch.inf])
    rows = 200_000
    counts = torch.bincount(draw(scores.expand(rows, -1)), minlength=len(scores))
    expected = scores.softmax(-1) * rows
    assert counts[scores == -torch.inf].sum() == 0
    possible = expected > 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_square < 16.3  # three degrees of freedom, p = 0.001


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1.0 - 2.0**-53, 2)])
def test_the_ends_of_the_unit_interval_draw_what_can_occur(monkeypatch, point, token):
    monkeypatch.setattr(generation.torch, "rand", lambda *size, **kwargs: torch.full(size, point, dtype=torch.float64))
    assert draw(torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])).tolist() == [token]


def test_a_draw_takes_one_random_number_a_row():
    torch.manual_seed(3)
    tokens = draw(torch.zeros(4, 1000))
    torch.manual_seed(3)
    assert tokens.tolist() == (torch.rand(4, dtype=torch.float64) * 1000).long().tolist()


packs = pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), pytest.param(torch.bfloat16, 2**-7, marks=needs_bfloat16)],
    ids=["float32", "bfloat16"],
)
"""Types whose layers are packed, and how far their products may be from those in float64."""


@packs
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 8])
def test_packed_layers_compute_the_same(bias, rows, dtype, tolerance):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(64, 96, bias=bias, dtype=dtype))
    double = copy.deepcopy(layer).double()
    hidden = torch.randn(rows, 3, 64, dtype=dtype)
    with torch.no_grad():
        with packed_linears(layer, dtype, FEWEST_STEPS):
            assert "forward" in vars(layer[0])
            packed = layer(hidden)
        exact = double(hidden.double())
        assert "forward" not in vars(layer[0])
    torch.testing.assert_close(packed.double(), exact, rtol=tolerance, atol=tolerance)


class Reads(nn.Module):
    """Three layers by the names that an attention gives them; the last may have read something else."""

    def __init__(self, biases=(True, True, True), other=None):
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj")
        for name, size, bias in zip(names, (32, 16, 8), biases, strict=True):
            self.add_module(name, nn.Linear(64, size, bias=bias))
        self.other = other or (lambda hidden: hidden)

    def forward(self, hidden):
        return torch.cat([self.q_proj(hidden), self.k_proj(hidden), self.v_proj(self.other(hidden))], -1)


@packs
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, True, False)])
@pytest.mark.parametrize("other", [None, torch.neg])
def test_layers_that_read_the_same_are_one_product(biases, other, context, dtype, tolerance):
    torch.manual_seed(0)
    reads = Reads(biases, other).to(dtype)
    hidden = torch.randn(8, 1, 64, dtype=dtype)
    with context():
        double = copy.deepcopy(reads).double()
        with packed_linears(reads, dtype, FEWEST_STEPS):
            assert (type(vars(reads.k_proj)["forward"].func) is _Joined) == (len(set(biases)) == 1)
            for states in (hidden, -hidden):  # the second call reads something else
                torch.testing.assert_close(
                    reads(states).double(), double(states.double()), rtol=tolerance, atol=tolerance
                )
    assert not any("forward" in vars(layer) for layer in reads.children())


@packs
def test_states_changed_in_place_between_two_layers_are_read_again(dtype, tolerance):
    torch.manual_seed(0)
    reads = Reads(other=torch.neg_).to(dtype)
    hidden = torch.randn(8, 1, 64, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(reads).double()(hidden.double())
        with packed_linears(reads, dtype, FEWEST_STEPS):
            torch.testing.assert_close(reads(hidden.clone()).double(), exact, rtol=tolerance, atol=tolerance)


@needs_bfloat16
def test_packed_layers_follow_autocast_and_the_weights_of_the_moment(model, prompts):
    ids = torch.stack([prompt[:3] for prompt in prompts])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), own_precision(model) as dtype:
        assert dtype == torch.bfloat16
        plain = model(ids).logits
        with packed_linears(model, dtype, FEWEST_STEPS):
            packed = model(ids).logits
        assert packed.dtype == plain.dtype
        torch.testing.assert_close(packed.float(), plain.float(), rtol=2e-2, atol=2e-2 * float(plain.abs().max()))
        weight = model.model.layers[0].mlp.up_proj.weight
        kept = weight.clone()
        weight.zero_()
        torch.clear_autocast_cache()
        try:
            with packed_linears(model, dtype, FEWEST_STEPS):
                changed = model(ids).logits
            torch.testing.assert_close(
                changed.float(), model(ids).logits.float(), rtol=2e-2, atol=2e-2 * float(plain.abs().max())
            )
        finally:
            weight.copy_(kept)


@pytest.mark.parametrize(("dtype", "steps"), [(torch.float64, 100), (torch.float32, FEWEST_STEPS - 1)])
def test_layers_stay_as_they_are_where_packing_does_not_help(dtype, steps):
    layer = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    with packed_linears(layer, dtype, steps):
        assert "forward" not in vars(layer[0])


@packs
def test_layers_are_restored_after_an_error(dtype, tolerance):
    layer = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    with pytest.raises(RuntimeError), packed_linears(layer, dtype, FEWEST_STEPS):
        raise RuntimeError
    assert "forward" not in vars(layer[0])


def test_a_frozen_head_is_not_copied_once_a_row(model, prompts):
    """torch expands frozen weights over the rows of states that do not lie in one piece."""
    whole = []
    with model.get_output_embeddings().register_forward_hook(
        lambda head, states, logits: whole.append(states[0].is_contiguous())
    ):
        generate(model, prompts, Sampling(2, temperature=0.0), set(), 0)
    assert whole and all(whole)
    assert not model.get_output_embeddings()._forward_pre_hooks
