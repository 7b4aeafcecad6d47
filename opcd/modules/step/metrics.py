"""The metrics of a step: seconds of its phases, token-weighted means, peak memory."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric

from opcd.modules.trajectories import Trajectories

SHOWN = ("train/divergence", "train/tokens_per_s", "train/response_tokens", "train/finished_fraction")
"""The metrics of a step that a progress bar shows."""
UNEVEN = ("divergence", "rollout_logprob_gap")
"""Prefixes of the metrics that a rank may lack, because it has no row of a teacher, or none of an engine."""


class PhaseTimer:
    """Seconds spent in named phases, each summed over its visits.

    On a GPU, events on the stream measure them, so that no phase waits for its own kernels.

    Attributes:
        phase: the one that began last.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.phase = device, ""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time inside the `with` block to `phase`."""
        self.phase, start = phase, self._now()
        try:
            yield
        finally:
            end = self._now()
            if isinstance(start, float):
                self._seconds[phase] += end - start
            else:
                self._events.append((phase, start, end))

    def _now(self) -> Any:
        """Seconds on a CPU, an event on a GPU."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase that has ended; on a GPU this waits for all their kernels."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)


class TokenMeans:
    """Means over the tokens of several micro-batches."""

    def __init__(self) -> None:
        self._means: dict[str, MeanMetric] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Add one value per token, [N], or fewer where a value is not known for all; no gradient is kept."""
        for name, value in values.items():
            if name not in self._means:  # nan_strategy: NaN must show in the mean
                mean = MeanMetric(nan_strategy="disable", sync_on_compute=False).to(value.device)
                mean.set_dtype(torch.float64)
                self._means[name] = mean
            self._means[name].update(value.detach().double())

    def compute(self) -> dict[str, float]:
        """The mean of every value over the tokens that have it."""
        return {name: float(mean.compute()) for name, mean in self._means.items() if mean.weight}

    def over_ranks(self, names: Sequence[str], all_sum: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of `names` over the tokens of all ranks, where any token has them; every rank must call this."""
        known = [self._means.get(name) for name in names]
        own = [[float(mean.mean_value), float(mean.weight)] if mean else [0.0, 0.0] for mean in known]
        sums = all_sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return {name: total / count for name, (total, count) in zip(names, sums, strict=True) if count}


def repetition(responses: list[Tensor], length: int = 4) -> float:
    """The share of a response's runs of `length` tokens that occurred in it before; mean over responses [R]; 0 to 1."""
    shares = []
    for response in responses:
        runs = list(zip(*(response.tolist()[start:] for start in range(length)), strict=False))
        shares.append(1 - len(set(runs)) / len(runs) if runs else 0.0)
    return sum(shares) / max(len(shares), 1)


def step_metrics(
    trajectories: Trajectories, means: TokenMeans, timer: PhaseTimer, gradient_norm: Tensor
) -> dict[str, float]:
    """The metrics of one step by name, without those that are `UNEVEN`: on every rank the same names in one order.

    Those of the responses leave anchors out.
    """
    seconds, tokens = timer.seconds, int(trajectories.lengths.sum())
    trajectories = trajectories.select((~trajectories.anchors).nonzero()[:, 0].tolist())
    rows = len(trajectories)
    return {
        **{f"train/{name}": mean for name, mean in means.compute().items() if not name.startswith(UNEVEN)},
        "train/tokens_per_s": tokens / seconds["step"],
        "train/response_tokens": int(trajectories.lengths.sum()) / rows,
        "train/finished_fraction": sum(trajectories.ended) / rows,
        "train/empty_fraction": trajectories.empty / rows,
        "train/repetition": repetition(trajectories.responses),
        "train/gradient_norm": float(gradient_norm),
        "memory/peak_mib": peak_memory_mib(timer.device),
        **{f"seconds/{phase}": spent for phase, spent in seconds.items()},
    }


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory in MiB: of the GPU's allocator, or on a CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
