"""A step on several ranks: what they agree on, and what each counts in the loss."""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from opcd.modules.distributed.fsdp_strategy import FSDP2Strategy


def is_sharded(trainer: Trainer) -> bool:
    """Whether this run has a sharded student: only training does, for whoever answers needs whole weights."""
    return isinstance(trainer.strategy, FSDP2Strategy) and trainer.state.fn == "fit"


class Ranks:
    """The ranks of a run, as one of them sees them.

    Args:
        trainer: its strategy joins the ranks.
        device: of this rank.
    """

    def __init__(self, trainer: Trainer, device: torch.device) -> None:
        self._strategy: Any = trainer.strategy
        self._device, self.number = device, trainer.world_size
        self.sharded = is_sharded(trainer)

    def passes(self, micro_batches: list[list[int]], gathering: bool) -> list[tuple[list[int], bool]]:
        """The rows of each forward and backward pass, and whether they count.

        Ranks that gather weights from one another (`gathering`) make as many passes: one with fewer repeats its
        shortest row.
        """
        idle = self.largest(len(micro_batches)) - len(micro_batches) if gathering else 0
        return [*((rows, True) for rows in micro_batches), *[(micro_batches[-1][-1:], False)] * idle]

    def share(self, weights: Tensor, lengths: Tensor, own: torch.dtype) -> Tensor:
        """What each response token counts in this rank's loss: weights of a token of each row [B], lengths [B] -> [N].

        `own` is the type of the student's weights.
        """
        # DDP averages gradients over ranks, the weights are shares of the sum over all of them: undo the mean.
        dtype = torch.promote_types(own, torch.float32)  # that of the divergence
        return weights.repeat_interleave(lengths).to(self._device, dtype) * self.number

    def backward(self, module: LightningModule, loss: Tensor, last: bool) -> None:
        """One of several backward passes; ranks add their gradients up after the last."""
        if last or not isinstance(self._strategy, ParallelStrategy):
            module.manual_backward(loss)
        else:
            with self._strategy.block_backward_sync():
                module.manual_backward(loss)

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers; every rank must ask."""
        if self.number == 1:
            return number
        return int(self._strategy.reduce(torch.tensor(number, device=self._device), reduce_op="max"))

    def all_sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks; every rank must ask."""
        found: Tensor = self._strategy.reduce(value.to(self._device), reduce_op="sum")
        return found
