"""What a file may ask for: numbers of a config, and the weights that a model is built with."""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from opcd.runtime.errors import UserError

COUNT = re.compile(r"(layers?|blocks?|heads?|experts?|heads?_kv|block_count|layer_count|head_count|expert_count)$")
"""Names of numbers that a model is built in a loop of."""
MOST_OF_A_COUNT = 10_000
MOST = 2**40
"""Of any other number."""
SPARE = 2**27
"""Elements that a model may have beside those of its files: buffers, masks."""


def oversized(name: str, value: object) -> str | None:
    """What is wrong with a number of a config; None where nothing is."""
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    if COUNT.search(name) and value > MOST_OF_A_COUNT:
        return f"{name} is {value:.6g}, and no model has more than {MOST_OF_A_COUNT}"
    return f"{name} is {value:.6g}, which is larger than any model's" if value > MOST else None


def explain(error: BaseException) -> str:
    """The first line of what a library says, with the kind of error where that says more than the text."""
    lines = str(error).strip().splitlines()
    text = " ".join(line.strip() for line in lines[:3])
    plain = isinstance(error, OSError | ValueError | ImportError)
    return text if plain and text else f"{type(error).__name__}: {text}"


class Budget:
    """Bounds on the weights of the models that are built within it, counted while they are built without memory.

    A config may describe a model that no memory holds, or a loop that does not end. transformers builds a model on the
    meta device before it reads the weights, so that this stops it before either costs anything.

    Args:
        elements: most elements of parameters and buffers, together.
        tensors: most parameters.
        what: names the file that describes the model.
    """

    def __init__(self, elements: int, tensors: int, what: str) -> None:
        self.elements, self.tensors, self.what = elements, tensors, what
        self._handles: list[Any] = []
        self._counted = [0, 0]

    def __enter__(self) -> None:
        self._handles = [
            torch_module.register_module_parameter_registration_hook(self._hook(1)),
            torch_module.register_module_buffer_registration_hook(self._hook(0)),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, tensors: int) -> Callable[[nn.Module, str, Tensor | None], None]:
        def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
            if tensor is None or tensor.device.type != "meta":
                return
            self._counted[0] += tensor.numel()
            self._counted[1] += tensors
            if self._counted[0] > self.elements or self._counted[1] > self.tensors:
                raise UserError(
                    f"{self.what} describes a larger model than its weights are of: at {type(module).__name__}.{name} "
                    f"it has {self._counted[1]} weights with {self._counted[0]:.3g} elements"
                )

        return count
