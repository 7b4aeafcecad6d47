"""Weights of which each rank holds a part (FSDP2, torch's `fully_shard`), and whole copies of models."""

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
    """Leave each rank of `mesh` its part of the weights of `root`, of their gradients and of what an optimizer keeps.

    A decoder layer of `model` is gathered for its own pass, and once more for its gradient; embeddings, final norm and
    head from the call of `root` to the end of the backward pass, because the loss reads the head between the two.

    Args:
        root: holds the model; its call is the forward pass.
        model: a causal language model on the CPU.
        mesh: all ranks, in one dimension.
        low: the type that layers are gathered in where autocast computes in it; their gradients add up in float32.
            What autograd keeps of a weight is then the weight itself, which goes after the layer's pass, and no cast.

    Raises:
        UserError: the family does not say which modules are its layers.
    """
    layers = _layers(model, "trainer.strategy", "use ddp")
    # The residual stream stays in float32, as under autocast alone.
    policy = MixedPrecisionPolicy(low, torch.float32 if low else None, cast_forward_inputs=False)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(root, mesh=mesh, reshard_after_forward=False)


class InParts:
    """A frozen model whose layers lie in parts on the ranks, each of which makes as many passes as it has to.

    A layer is gathered for its pass and let go after it, and that takes all ranks: before each pass they say whether
    one of them has another to make, and a rank that has none only gives its parts. Embedding, final norm and head stay
    whole.

    Args:
        model: a causal language model.
        device: where its parts lie.
        key: the model's config key, for messages.

    Raises:
        UserError: the family does not say which modules are its layers.
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
        """Around all passes that this rank has to make; every rank must enter as often."""
        yield
        while self._another(False):
            for layer in self._layers:
                layer.unshard()  # type: ignore[operator]
                layer.reshard()  # type: ignore[operator]

    def _announce(self, *call: object) -> None:
        self._another(True)

    def _another(self, mine: bool) -> bool:
        """Whether any rank has another pass to make."""
        vote = torch.tensor(float(mine), device=self._device)
        torch.distributed.all_reduce(vote, torch.distributed.ReduceOp.MAX, self._group)
        return bool(vote)


def _layers(model: PreTrainedModel, key: str, instead: str) -> list[nn.Module]:
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"{key}: {type(model).__name__} does not say which modules are its layers; {instead}")
    return layers


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part: every rank must ask, in the same order."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, owner: Tensor | None) -> Tensor:
    """What this rank holds of a whole tensor that has the shape of `owner`, if that lies in parts; else all of it."""
    if not isinstance(owner, DTensor) or tensor.shape != owner.shape:
        return tensor
    # Every rank has the tensor: nothing is sent.
    return distribute_tensor(tensor.to(owner.device), owner.device_mesh, owner.placements, src_data_rank=None)


def blank_copy(
    model: PreTrainedModel, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> PreTrainedModel:
    """A copy whose weights are not filled. Its buffers keep their type: rotary frequencies stay in float32."""
    weights: dict[int, object] = {
        id(weight): nn.Parameter(torch.empty_like(weight, dtype=dtype, device=device), weight.requires_grad)
        for weight in model.parameters()
    }
    return copy.deepcopy(model, weights)


@torch.no_grad()
def fill(model: PreTrainedModel, source: PreTrainedModel) -> None:
    """Overwrite the weights of a copy with those of `source`; where they lie in parts, every rank must take part."""
    pairs = list(zip(model.parameters(), source.parameters(), strict=True))
    if not any(isinstance(weight, DTensor) for _, weight in pairs):
        torch._foreach_copy_([mine for mine, _ in pairs], [weight for _, weight in pairs])
        return
    for mine, weight in pairs:  # one whole tensor at a time, gathered in the type of the copy
        mine.copy_(full_tensor(weight.to(mine.dtype)))
