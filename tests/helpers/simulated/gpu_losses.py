"""The chunked losses on the simulated GPU: kernels and syncs of a chunk, and values and gradients beside float64.

python -m tests.helpers.simulated.gpu_losses        # one JSON object, by loss
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opcd.losses import JSD, Divergence, ForwardKL, Head, ReverseKL, SkewReverseKL, TopK, _kernels, chunked, chunking
from opcd.modules.objective import Objective
from tests.helpers.simulated.gpu_device import DEVICE, NAME, Counts, counted

V, H, ROWS, TEMPERATURE = 50, 16, 8, 0.7
LOSSES: dict[str, Divergence] = {
    "ReverseKL": ReverseKL(),
    "ForwardKL": ForwardKL(),
    "JSD": JSD(),
    "SkewReverseKL": SkewReverseKL(),
    "TopK of the student": TopK(ReverseKL(), 4, "student"),
    "TopK of either": TopK(ReverseKL(), 4, "union"),
    "TopK of both": TopK(ReverseKL(), 4, "intersection"),
}


@dataclass
class Case:
    """A loss on chunks of 8 tokens, of random heads and states.

    Attributes:
        loss: what is compared.
        chunks: how many.
        autocast: whether the products are in bfloat16.
        never: the models that give the last three tokens a probability of zero: "", "teacher" or "both".
    """

    loss: Divergence
    chunks: int
    autocast: bool = False
    never: str = ""

    def __post_init__(self) -> None:
        torch.manual_seed(self.chunks)
        n = ROWS * self.chunks
        (self.x, self.y), (self.w, self.v) = torch.randn(2, n, H), torch.randn(2, V, H) * 0.5
        self.weights, self.tokens = torch.rand(n), torch.randint(0, V, (n,))
        biases = torch.zeros(2, V)
        biases[{"": 2, "teacher": 1, "both": 0}[self.never] :, -3:] = -math.inf
        self.student_bias, self.teacher_bias = biases

    def _to(self, **place: Any) -> list[Tensor]:
        x, w, *rest = (t.to(**place) for t in (self.x, self.w, self.y, self.v, self.student_bias, self.teacher_bias))
        return [x.requires_grad_(), w.requires_grad_(), *rest, self.weights.to(**place)]

    def _values(self, *chunk: Tensor) -> tuple[Tensor, ...]:
        return tuple(Objective(self.loss, TEMPERATURE, 20.0)._terms(*chunk).values())

    def on_device(self) -> tuple[list[Tensor], Counts]:
        """Values, statistics and both gradients, and what it took."""
        x, w, y, v, b, c, weights = self._to(device=DEVICE)
        tokens = self.tokens.to(DEVICE)
        heads = [Head(w, b), Head(v, c)] if self.never else [Head(w), Head(v)]
        options = {"weights": weights, "temperature": TEMPERATURE}
        with counted() as counts, torch.autocast(NAME, torch.bfloat16, enabled=self.autocast):
            found = chunked(self._values, x, heads[0], y, heads[1], (tokens,), **options)
            (found[0] * weights).sum().backward()
        return [t.detach().double().cpu() for t in (*found, x.grad, w.grad)], counts

    def reference(self) -> list[Tensor]:
        """The same in float64 on the CPU, with dense logits."""
        x, w, y, v, b, c, weights = self._to(dtype=torch.float64)
        both = ((logits / TEMPERATURE).log_softmax(-1) for logits in (x @ w.T + b, y @ v.T + c))
        found = self._values(*both, self.tokens)
        (found[0] * weights).sum().backward()
        return [t.detach() for t in (*found, x.grad, w.grad)]


def per_chunk(loss: Divergence) -> dict[str, Any]:
    """The counts of one chunk, and the syncs of a call beside those of its chunks."""
    _, two, three = (Case(loss, chunks, autocast=True).on_device()[1] for chunks in (1, 2, 3))  # one tries the device
    syncs = three.syncs - two.syncs
    kernels = (three.kernels - two.kernels).total()
    return {"kernels": kernels, "syncs": syncs.total(), "syncs of a call": (two.syncs - syncs - syncs).total()}


def error(loss: Divergence, never: str) -> float:
    """The largest difference of a result from float64, relative to the largest number of that result."""
    case = Case(loss, 3, never=never)
    pairs = zip(case.on_device()[0], case.reference(), strict=True)
    return max(float((found - right).abs().max() / right.abs().max().clamp(min=1e-3)) for found, right in pairs)


def main() -> None:
    """Print the findings."""
    chunking.GPU_MOST_ROWS, _kernels.NARROW = ROWS, 20
    found = {
        name: per_chunk(loss) | {f"error, {never}": error(loss, never) for never in ("", "teacher", "both")}
        for name, loss in LOSSES.items()
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
