"""Bytes that a layer keeps for its gradient, a token: what autograd saves, counted tensor by tensor.

A test compares them with what autograd saves of a Llama, a Qwen2 and a Qwen3 (tests/test_doctor_plan.py).
"""

from opcd.modules.lm.adapters import ALL_LINEAR
from opcd.planning.model_shapes import Shape, Weights
from opcd.planning.setting import Setting


def kept_of_layer(setting: Setting) -> int:
    """A layer of the student: norms, inputs of products, attention, and the gated MLP."""
    shape, learns, c = setting.student.shape, setting.lora is None, setting.computing
    r = setting.student.dtype.itemsize  # of the residual stream
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    # A norm computes in float32: its input, and, for the gradient of its own weights, its result before them.
    norm = 4 + (r if learns else 0)
    kept = shape.norms * (norm * shape.hidden + 4)
    if shape.head_norms:
        kept += (4 + (c if learns else 0)) * (queries + keys) + 4 * (shape.heads + shape.kv_heads)
    kept += 2 * c * (queries + keys) + 4 * shape.heads  # queries, keys, values, result; a sum for each row of scores
    kept += 3 * c * shape.intermediate  # both factors, and what the activation function takes
    return kept + (_inputs(shape, r, c) if learns else _adapter_inputs(setting))


def kept_of_pass(setting: Setting) -> int:
    """All layers and the last norm, or with gradient checkpointing the input of each layer."""
    shape, r = setting.student.shape, setting.student.dtype.itemsize
    layer = r * shape.hidden if setting.checkpointing else kept_of_layer(setting)
    return shape.layers * layer + (4 + r) * shape.hidden


def alive_in_layer(weights: Weights, computing: int) -> int:
    """About what one layer has at once without keeping it, or while its gradient is computed."""
    shape = weights.shape
    return 3 * weights.dtype.itemsize * shape.hidden + 3 * computing * shape.intermediate


def _inputs(shape: Shape, r: int, c: int) -> int:
    """Of products with weights that learn; autocast casts the input of each anew. That of o_proj is kept already."""
    of_norms = 5 * c if r != c else 2 * c
    return of_norms * shape.hidden + c * shape.intermediate


def _adapter_inputs(setting: Setting) -> int:
    """Of both products of an adapter, cast for each (where nothing is cast, some are one tensor, which counts twice).

    The weights beside it do not learn, and keep nothing.
    """
    assert setting.lora is not None
    size = setting.autocast.itemsize if setting.autocast else 4
    targets, layers = setting.lora.targets, setting.student.shape.layers
    inputs = [
        a + setting.lora.rank for n, a, _ in setting.student.shape.linears if targets == ALL_LINEAR or n in targets
    ]
    return size * sum(inputs) // layers
