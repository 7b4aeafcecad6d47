"""What a step measures: seconds of its parts, token-weighted means, peak memory."""

import resource
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from opcd.modules.trajectories import Trajectories

SHOWN = ("train/divergence", "train/tokens_per_s", "train/response_tokens", "train/ended")
"""What a progress bar shows of a step."""
UNEVEN = ("divergence", "rollout_gap")
"""How the names begin of values that a rank may lack, for it has no row of a teacher or of an engine's."""


class Stopwatch:
    """Seconds spent in named parts, each part summed over its visits.

    On a GPU a part ends with a synchronisation, so that the seconds are those of the kernels it launched.

    Attributes:
        seconds: of each part.
        part: the one that was begun last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.part = ""

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Count the time inside the `with` block to `part`."""
        self.part, start = part, time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[part] += time.perf_counter() - start


class TokenMeans:
    """Means over tokens of several micro-batches."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: Counter[str] = Counter()

    @property
    def tokens(self) -> int:
        """How many there are; some values are known of fewer."""
        return max(self._counts.values(), default=0)

    def add(self, values: dict[str, Tensor]) -> None:
        """Add a value a token, [N] or, where it is not known of all, fewer; no gradient is kept."""
        for name, value in values.items():
            total = value.detach().double().sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] += len(value)

    def compute(self) -> dict[str, float]:
        """Mean of every value over the tokens that had it."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items() if self._counts[name]}

    def over_ranks(self, names: Sequence[str], all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The same of some values over the tokens of all ranks, less those that no token had; every rank must ask."""
        own = [[float(self._sums.get(name, 0.0)), float(self._counts[name])] for name in names]
        sums = all_sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


def repetition(responses: list[Tensor], length: int = 4) -> float:
    """Share of a response's runs of `length` tokens that it has said before, the mean over responses [R]; 0 to 1."""
    shares = []
    for response in responses:
        runs = list(zip(*(response.tolist()[start:] for start in range(length)), strict=False))
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    return sum(shares) / max(len(shares), 1)


def step_metrics(
    trajectories: Trajectories, means: TokenMeans, clock: Stopwatch, gradient_norm: Tensor
) -> dict[str, float]:
    """What one step is logged as beside what is `UNEVEN`, by name: the same names, in one order, on every rank."""
    rows = len(trajectories)
    return {
        **{f"train/{name}": mean for name, mean in means.compute().items() if not name.startswith(UNEVEN)},
        "train/tokens_per_s": means.tokens / clock.seconds["step"],
        "train/response_tokens": means.tokens / rows,
        "train/ended": sum(trajectories.ended) / rows,
        "train/empty": trajectories.empty / rows,
        "train/repetition": repetition(trajectories.responses),
        "train/gradient_norm": float(gradient_norm),
        "memory/peak_mib": peak_memory_mib(clock.device),
        **{f"seconds/{part}": seconds for part, seconds in clock.seconds.items()},
    }


def peak_memory_mib(device: torch.device) -> float:
    """Most memory so far, in MiB: of the GPU's allocator, or of the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
