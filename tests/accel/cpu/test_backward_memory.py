"""The backward pass that saves memory gives autograd's own gradients."""

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

from opcd.accel.cpu import accelerator as cpu
from opcd.accel.cpu.accelerator import LAYERS, less_memory_in_backward
from tests.helpers.small_models import FAMILIES, SMALL, WITHOUT

MODELS = FAMILIES | {"mamba, recurrent": WITHOUT["mamba, recurrent"]}


def recomputing(make):
    torch.manual_seed(0)
    model = make().double().train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def rows(*sizes):
    """Token ids, the padding's 0 among them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 7, (2, size), generator=generator) for size in sizes]


def gradients(model, logits=True):
    """After two passes, as of two micro-batches."""
    for ids in rows(5, 9):
        result = model(input_ids=ids).logits if logits else model.base_model(input_ids=ids).last_hidden_state
        (result * torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_those_of_autograd(family, tied, logits):
    """With the head, which brings a gradient first, and without; tied to the embedding or not."""

    def make():
        model = MODELS[family]()
        weight = model.get_input_embeddings().weight
        model.lm_head.weight = weight if tied else torch.nn.Parameter(weight.detach().clone())
        return model

    plain, lean = recomputing(make), recomputing(make)
    less_memory_in_backward(lean)
    for (name, expected), found in zip(gradients(plain, logits).items(), gradients(lean, logits).values(), strict=True):
        assert (found is None) == (expected is None), name
        if expected is not None:
            assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=name)


def test_the_heap_goes_back_every_few_layers_and_before_the_embedding(monkeypatch):
    model = recomputing(lambda: LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_hidden_layers": LAYERS + 1})))
    less_memory_in_backward(model)
    there = []
    monkeypatch.setattr(
        cpu,
        "trim_heap",
        lambda: there.append([layer.mlp.up_proj.weight.grad is not None for layer in model.model.layers]),
    )
    model(input_ids=rows(4)[0]).logits.sum().backward()
    assert there == [[False] * (LAYERS + 1), [False] + [True] * LAYERS, [True] * (LAYERS + 1)]


def test_a_frozen_embedding_gets_no_gradient():
    model = recomputing(FAMILIES["llama"])
    less_memory_in_backward(model)
    model.enable_input_require_grads()  # as peft does
    embedding = model.get_input_embeddings().weight.requires_grad_(False)
    gradients(model)
    assert embedding.grad is None and model.model.layers[0].mlp.up_proj.weight.grad is not None


def test_on_several_ranks_autograd_brings_it(monkeypatch):
    """DDP adds gradients up when autograd brings them."""
    model = recomputing(FAMILIES["llama"])
    less_memory_in_backward(model)
    brought = []
    model.get_input_embeddings().weight.register_post_accumulate_grad_hook(brought.append)
    gradients(model, logits=False)
    assert not brought
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    gradients(model, logits=False)
    assert len(brought) == 2
