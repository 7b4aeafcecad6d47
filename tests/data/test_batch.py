"""Batches: part of one, and one on another device."""

import torch

from opcd.data import Batch
from opcd.data.batch import Row


def make(example):
    first = Row(example("a"), "c", *map(torch.tensor, ([1], [4, 1], [4])), None)
    second = Row(example("b", index=1), "d", *map(torch.tensor, ([2, 3], [5, 2, 3], [5], [6])))
    return Batch([first, second], views={})


def test_select(example):
    batch = make(example)
    part = batch.select([1, 1, 0])
    assert (len(batch), len(part)) == (2, 3)
    assert [e.query for e in part.examples] == ["b", "b", "a"]
    assert part.contexts == ["d", "d", "c"]
    assert [p.tolist() for p in part.student_prompts] == [[2, 3], [2, 3], [1]]
    assert [p.tolist() for p in part.teacher_prompts] == [[5, 2, 3], [5, 2, 3], [4, 1]]
    assert [p.tolist() for p in part.teacher_prefixes] == [[5], [5], [4]]
    assert [None if r is None else r.tolist() for r in part.responses] == [[6], [6], None]


def test_to_moves_a_copy(example):
    batch = make(example)
    moved = batch.to("meta")
    tensors = [*moved.student_prompts, *moved.teacher_prompts, moved.responses[1]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.responses[0] is None
    assert (moved.examples, moved.contexts) == (batch.examples, batch.contexts)
    assert batch.student_prompts[0].device.type == "cpu"
