"""The order of the training rows, which a run can take up where it stopped."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import Dataset, DistributedSampler

from opcd.data.example import Example


class ResumableSampler(DistributedSampler[Example]):
    """The order of a rank's rows is a function of seed, epoch and rank; the first epoch may begin anywhere in it.

    Args:
        dataset: all rows.
        num_replicas: number of ranks.
        rank: this rank.
        shuffle: a new order in each epoch.
        seed: seed of that order.
        epoch: the first epoch.
        start: rows of this rank that are left out of the first epoch, for they were trained on.
    """

    def __init__(
        self,
        dataset: Dataset[Example],
        num_replicas: int,
        rank: int,
        shuffle: bool,
        seed: int,
        epoch: int = 0,
        start: int = 0,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle, seed)
        self.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[Example]:
        """Indices of an epoch; the length stays that of a whole one, which Lightning counts by."""
        start, self.start = self.start, 0
        return islice(super().__iter__(), start, None)
