"""What turns the last hidden states of a language model into logits: a head is not only a matrix."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opcd.losses._accumulating_linear import AccumulatingProduct
from opcd.losses._validation import check_device, check_floating, check_positive
from opcd.losses.log_probs import at_least_float32

Projection = Tensor | nn.Module | Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Head:
    """logits = softcap · tanh(scale · (hidden @ projectionᵀ + bias) / softcap), [N, H] -> [N, V].

    The projection runs in its own dtype, or in autocast's; what follows it in float32 (float64 stays float64).

    Raises:
        ValueError: for a projection that is not [V, H] floating point, a bias that is not [V] or goes with a module
            (which has its own), and a scale or softcap that is not positive.
        TypeError: for a projection that is neither a tensor nor callable.
    """

    projection: Projection
    """[V, H], or what maps hidden states [N, H] to [N, V]: a module (an adapter on the head included) or a function."""

    bias: Tensor | None = None
    """[V], added to the product with a matrix; a module or function brings its own."""

    softcap: float | None = None
    """Bounds every logit to ±softcap: Gemma 2's ``final_logit_softcapping``. None: no bound."""

    scale: float = 1.0
    """Multiplies the logits before the bound: Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``."""

    def __post_init__(self) -> None:
        check_positive(self.scale, "scale")
        if self.softcap is not None:
            check_positive(self.softcap, "softcap")
        if isinstance(self.projection, Tensor):
            _check_matrix(self.projection, self.bias)
        elif not callable(self.projection):
            raise TypeError(f"a head is a Head, a matrix [V, H], a module or a function, not {type(self.projection)}")
        elif self.bias is not None:
            raise ValueError("bias goes with a projection that is a matrix; a module or function adds its own")

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [N, V] of the hidden states [N, H], in float32 (float64 stays float64)."""
        logits = at_least_float32(self._project(hidden))
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def vocabulary_size(self, hidden: Tensor) -> int:
        """V, the length of a row of logits; a module or function is asked with one row like ``hidden`` [N, H]."""
        if isinstance(self.projection, Tensor):
            return self.projection.shape[0]
        return self(hidden.new_zeros(1, hidden.shape[-1])).shape[-1]

    def trainable(self, hidden: Tensor) -> list[Tensor]:
        """What a gradient goes to beside hidden states like ``hidden`` [N, H]: matrix, bias, adapter."""
        if (plain := self._plain()) is not None:
            return [weight for weight in plain if weight is not None and weight.requires_grad]
        with torch.enable_grad():
            return _leaves(self(hidden.new_zeros(1, hidden.shape[-1])))

    def accumulating(self, sums: list[Tensor]) -> "Head":
        """The same, whose backward pass adds a plain matrix's gradient to the first of ``sums``, as in `trainable`."""
        plain = self._plain()
        if plain is None or not sums or not plain[0].requires_grad:
            return self
        return replace(self, projection=AccumulatingProduct(*plain, sums[0]), bias=None)

    @property
    def is_plain(self) -> bool:
        """Whether the logits come from a product with a matrix, and are nobody else's; a function may keep its own."""
        return isinstance(self.projection, AccumulatingProduct) or self._plain() is not None

    @property
    def is_function(self) -> bool:
        """Whether the projection is neither a matrix nor a module: it may close over results of a graph."""
        return not isinstance(self.projection, Tensor | nn.Module)

    def _plain(self) -> tuple[Tensor, Tensor | None] | None:
        """Matrix and bias, where the projection is their product with the hidden states and nothing else."""
        if isinstance(self.projection, Tensor):
            return self.projection, self.bias
        linear = self.projection
        hooked = getattr(linear, "_forward_hooks", None) or getattr(linear, "_forward_pre_hooks", None)
        if type(linear) is nn.Linear and not hooked and type(linear.weight.data) is Tensor:
            return linear.weight, linear.bias
        return None

    def _project(self, hidden: Tensor) -> Tensor:
        if isinstance(self.projection, Tensor):
            return _product(hidden, self.projection, self.bias)
        if isinstance(self.projection, nn.Module):
            hidden = hidden.to(_compute_dtype(self.projection, hidden.dtype))
        return self.projection(hidden)


def as_head(head: Head | Projection) -> Head:
    """A ``Head`` as it is; a matrix [V, H], a module or a function as a plain ``Head`` over it."""
    return head if isinstance(head, Head) else Head(head)


def _product(hidden: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ matrixᵀ + bias in the matrix's dtype (autocast, where it is on, chooses its own)."""
    check_device(hidden, "hidden states", matrix, "the head's matrix")
    if hidden.shape[-1] != matrix.shape[1]:
        raise ValueError(
            f"hidden states are {list(hidden.shape)} and the head's matrix {list(matrix.shape)}: their last sizes must "
            "be equal; was the other model's head given?"
        )
    return nn.functional.linear(hidden.to(matrix.dtype), matrix, None if bias is None else bias.to(matrix.dtype))


def _leaves(output: Tensor) -> list[Tensor]:
    """The leaves of the graph that made a tensor, each once."""
    found, seen, todo = [], set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        todo += [following for following, _ in node.next_functions]
    return found


def _compute_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype of the module's first floating-point parameter; a quantized module has its own way with any dtype."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)


def _check_matrix(matrix: Tensor, bias: Tensor | None) -> None:
    """Refuse a matrix that is not [V, H] floating point, and a bias that is not [V]."""
    check_floating(matrix, "the values of the head's matrix")
    if matrix.dim() != 2:
        raise ValueError(f"the head's matrix is {list(matrix.shape)}; it must be [V, H], as lm_head.weight is")
    if bias is not None and bias.shape != matrix.shape[:1]:
        raise ValueError(f"the head's bias is {list(bias.shape)}; a matrix {list(matrix.shape)} goes with [V]")
