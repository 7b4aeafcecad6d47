"""A LightningModule's part in a step on several ranks: what they agree on, and what each counts in the loss."""

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor

from opcd.modules.distributed.fsdp_strategy import FullyShard
from opcd.modules.trajectories import Trajectories


class OnRanks(LightningModule):
    """Micro-batches, sums and backward passes of a step that all ranks take together."""

    @property
    def _sharded(self) -> bool:
        """Whether this run has a sharded student: only training does, for whoever answers needs whole weights."""
        return isinstance(self.trainer.strategy, FullyShard) and self.trainer.state.fn == "fit"

    def _in_step(self, micro_batches: list[list[int]], gathering: bool) -> list[tuple[list[int], bool]]:
        """The rows of each pass, and whether they count.

        Ranks that gather weights from one another make as many passes: one with fewer repeats its shortest row.
        """
        idle = self._largest(len(micro_batches)) - len(micro_batches) if gathering else 0
        return [*((rows, True) for rows in micro_batches), *[(micro_batches[-1][-1:], False)] * idle]

    def _share(self, weights: Tensor, trajectories: Trajectories, own: torch.dtype) -> Tensor:
        """What each response token counts in this rank's loss, from the weights of a token of each row: [B] -> [N].

        `own` is the type of the student's weights.
        """
        # DDP averages gradients over ranks, the weights are shares of the sum over all of them: undo the mean.
        dtype = torch.promote_types(own, torch.float32)  # that of the divergence
        return weights.repeat_interleave(trajectories.lengths).to(self.device, dtype) * self.trainer.world_size

    def _backward(self, loss: Tensor, last: bool) -> None:
        """One of several backward passes; ranks add their gradients up after the last."""
        strategy = self.trainer.strategy
        if last or not isinstance(strategy, ParallelStrategy):
            self.manual_backward(loss)
        else:
            with strategy.block_backward_sync():
                self.manual_backward(loss)

    def _largest(self, number: int) -> int:
        """The largest of all ranks' numbers; every rank must ask."""
        if self.trainer.world_size == 1:
            return number
        return int(self.trainer.strategy.reduce(torch.tensor(number, device=self.device), reduce_op="max"))

    def _all_sum(self, value: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(value.to(self.device), reduce_op="sum")
