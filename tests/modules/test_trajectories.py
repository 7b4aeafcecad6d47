"""End of sequence, micro-batches, and the weights of the reductions."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from opcd.modules.trajectories import PASS, Trajectories, first_sequence, length_groups, token_weights
from opcd.runtime.errors import UserError


def test_nothing_after_the_first_end_of_sequence_counts(batch):
    responses = [torch.tensor([7, 8, 2, 9, 2, 2])] + [torch.tensor([5, 6])] * 7
    trajectories = Trajectories.of(batch, responses, {2, 3})
    assert trajectories.responses[0].tolist() == [7, 8, 2]
    assert trajectories.ended == [True] + [False] * 7
    assert trajectories.lengths.tolist() == [3] + [2] * 7


def test_empty_responses_are_counted_and_none_at_all_is_named(batch):
    trajectories = Trajectories.of(batch, [torch.tensor([2])] * 3 + [torch.tensor([5])] * 5, {2})
    assert trajectories.empty == 3
    with pytest.raises(UserError, match=r"rows.jsonl:1: the rollout wrote no token"):
        Trajectories.of(batch, [torch.tensor([], dtype=torch.long)] * 8, {2})


@pytest.mark.case("GPU-B1")
def test_all_tensors_are_on_the_prompts_device(batch):
    """An engine gives its responses on the CPU; what follows joins them with the prompts."""
    responses = [torch.tensor([7, 8, 2, 9])] * 8
    log_probs = [torch.tensor([-1.0, -2.0, -0.5, -3.0]), *[None] * 7]
    trajectories = Trajectories.of(batch.to("meta"), responses, {2}, log_probs)
    tensors = [value for row in trajectories.rows for value in vars(row).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 4 * 8 + 1
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert trajectories.ended == [True] * 8
    assert trajectories.lengths.tolist() == [3] * 8


def test_any_of_several_end_tokens_ends():
    assert first_sequence(torch.tensor([7, 3, 2]), {2, 3}).tolist() == [7, 3]


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=20), limit=st.integers(1, 200))
def test_groups_hold_every_row_once_within_the_limit(sizes, limit):
    groups = length_groups(sizes, limit)
    assert sorted(index for group in groups for index in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(sizes[i] for i in group) <= limit


@given(sizes=st.lists(st.integers(1, 900), min_size=1, max_size=7), limit=st.integers(900, 4000))
def test_no_other_groups_of_neighbours_cost_less(sizes, limit):
    def cost(groups):
        return sum(len(group) * max(group) + PASS for group in groups)

    ordered, costs = sorted(sizes, reverse=True), []
    for cuts in product([False, True], repeat=len(sizes) - 1):
        places = [0, *(n for n, cut in enumerate(cuts, start=1) if cut), len(sizes)]
        groups = [ordered[a:b] for a, b in pairwise(places)]
        if all(len(group) == 1 or len(group) * group[0] <= limit for group in groups):
            costs.append(cost(groups))
    assert cost([[sizes[i] for i in group] for group in length_groups(sizes, limit)]) == min(costs)


def test_weights_by_hand():
    lengths = torch.tensor([1, 3])
    assert_close(token_weights(lengths, "token", lambda x: x), torch.tensor([1 / 4, 1 / 4], dtype=torch.float64))
    assert_close(token_weights(lengths, "sequence", lambda x: x), torch.tensor([1 / 2, 1 / 6], dtype=torch.float64))


def test_weights_of_two_ranks_sum_to_one():
    ranks = [torch.tensor([1, 3]), torch.tensor([5, 2])]
    for reduction in ("token", "sequence"):
        sums = {"token": [11.0, 4.0], "sequence": [11.0, 4.0]}[reduction]
        total = sum(float((token_weights(r, reduction, lambda _: torch.tensor(sums)) * r).sum()) for r in ranks)  # noqa: B023
        assert abs(total - 1) < 1e-6
