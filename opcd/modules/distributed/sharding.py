"""Sharded weights (FSDP2, torch's `fully_shard`), and unsharded copies of models."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from opcd.runtime.errors import UserError


def shard(root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, low: torch.dtype | None) -> None:
    """Shard the weights of `root`, their gradients and the optimizer's state across the ranks of `mesh`.

    A decoder layer of `model` is gathered for its forward pass, and again for its backward pass; embeddings, final norm
    and head from the call of `root` to the end of the backward pass, because the loss reads the head in between.

    Args:
        root: holds the model; its call is the forward pass.
        model: a causal language model on the CPU.
        mesh: all ranks, in one dimension.
        low: the type in which layers are gathered, if autocast computes in it; gradients are summed in float32. Then
            autograd keeps the gathered weight, which is freed after the layer's pass, and no cast of it.

    Raises:
        UserError: the model does not name its layers.
    """
    layers = _layers(model, "trainer.strategy", "use ddp")
    # The residual stream stays in float32, as under autocast alone.
    policy = MixedPrecisionPolicy(low, torch.float32 if low else None, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)


class ShardedTeacher:
    """A frozen model whose layers are sharded across ranks that may need different numbers of passes.

    A layer is gathered for its pass and freed after it, which needs all ranks. Before each pass the ranks agree whether
    any of them has another pass; a rank without one only sends its shards. Embedding, final norm and head are not
    sharded.

    Args:
        model: a causal language model.
        device: of the shards.
        key: the model's config key, for messages.

    Raises:
        UserError: the model does not name its layers.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, key: str) -> None:
        self._layers = _layers(model, key, "leave shard out")
        self._device = device
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        self._group = mesh.get_group()
        for layer in self._layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        self._layers[0].register_forward_pre_hook(self._announce, prepend=True)  # before its weights are gathered

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Within, this rank runs all its passes; every rank must enter equally often."""
        yield
        while self._another(False):
            for layer in self._layers:
                layer.unshard()  # type: ignore[operator]
                layer.reshard()  # type: ignore[operator]

    def _announce(self, *call: object) -> None:
        self._another(True)

    def _another(self, mine: bool) -> bool:
        """Whether any rank has another pass."""
        vote = torch.tensor(float(mine), device=self._device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, self._group)
        return bool(vote)


def _layers(model: PreTrainedModel, key: str, instead: str) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"{key}: {type(model).__name__} does not name the modules that are its layers; {instead}")
    return layers


def full_tensor(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be sharded; every rank must call this, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, owner: Tensor | None) -> Tensor:
    """This rank's shard of a full tensor, if `owner` has the same shape and is sharded; else the full tensor."""
    if not isinstance(owner, DTensor) or tensor.shape != owner.shape:
        return tensor
    # Every rank has the tensor: nothing is sent.
    return distribute_tensor(tensor.to(owner.device), owner.device_mesh, owner.placements, src_data_rank=None)


def blank_copy(
    model: PreTrainedModel, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A copy with uninitialized weights. Its buffers keep their type: rotary frequencies stay in float32."""
    weights: dict[int, object] = {
        id(weight): nn.Parameter(torch.empty_like(weight, dtype=dtype, device=device), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights)


@torch.no_grad()
def fill(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Overwrite the weights of a copy with those of `source`; if they are sharded, every rank must call this."""
    pairs = list(zip(model.parameters(), source.parameters(), strict=True))
    if not any(isinstance(weight, DTensor) for _, weight in pairs):
        torch._foreach_copy_([mine for mine, _ in pairs], [weight for _, weight in pairs])
        return
    for mine, weight in pairs:  # one full tensor at a time, gathered in the type of the copy
        mine.copy_(full_tensor(weight.to(mine.dtype)))
