"""What a head computes, and what it refuses."""

import pytest
import torch
from torch import nn

from opcd.losses import Head, as_head

HIDDEN = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
MATRIX = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]])


def test_a_matrix_with_bias_scale_and_softcap() -> None:
    bias = torch.tensor([0.1, 0.2, 0.3])
    logits = Head(MATRIX, bias=bias, scale=0.25, softcap=1.5)(HIDDEN)
    plain = torch.tensor([[1.1, -1.8, 0.3], [0.6, 3.2, 4.3]])
    torch.testing.assert_close(logits, 1.5 * torch.tanh(0.25 * plain / 1.5))


def test_a_module_brings_its_bias_and_still_takes_scale_and_softcap() -> None:
    module = nn.Linear(2, 3)
    logits = Head(module, scale=2.0, softcap=30.0)(HIDDEN)
    torch.testing.assert_close(logits, 30 * torch.tanh(2 * module(HIDDEN) / 30))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hidden_states_follow_the_dtype_of_the_weights(hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    matrix = MATRIX.to(weight_dtype)
    module = nn.Linear(2, 3, bias=False, dtype=weight_dtype)
    module.weight.data.copy_(matrix)
    for projection in (matrix, module):
        logits = as_head(projection)(HIDDEN.to(hidden_dtype))
        assert logits.dtype == (torch.float64 if weight_dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(logits.float(), HIDDEN @ MATRIX.T)  # these numbers are exact in bfloat16


def test_autocast_projects_in_its_own_dtype_and_caps_in_float32() -> None:
    hidden, matrix = torch.randn(4, 32), torch.randn(9, 32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = Head(matrix, softcap=20.0)(hidden)
    product = (hidden.bfloat16() @ matrix.bfloat16().T).float()
    torch.testing.assert_close(logits, 20 * torch.tanh(product / 20), rtol=0, atol=0)


@pytest.mark.parametrize(
    "projection", [MATRIX, nn.Linear(2, 3), lambda hidden: hidden @ MATRIX.T], ids=["matrix", "module", "function"]
)
def test_as_head_takes_all_forms_and_knows_the_vocabulary(projection: object) -> None:
    head = as_head(projection)  # type: ignore[arg-type]
    assert head(HIDDEN).shape == (2, 3)
    assert head.vocabulary_size(HIDDEN) == head.vocabulary_size(HIDDEN[:0]) == 3
    assert as_head(head) is head


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"projection": torch.zeros(3)}, r"\[3\]; it must be \[V, H\]"),
        ({"projection": torch.zeros(3, 2, dtype=torch.long)}, "int64, not floating point"),
        ({"projection": MATRIX, "bias": torch.zeros(2)}, r"bias is \[2\]"),
        ({"projection": nn.Linear(2, 3), "bias": torch.zeros(3)}, "adds its own"),
        ({"projection": MATRIX, "softcap": 0.0}, "softcap is 0.0"),
        ({"projection": MATRIX, "scale": -1.0}, "scale is -1.0"),
    ],
)
def test_bad_heads_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Head(**arguments)  # type: ignore[arg-type]


def test_a_head_that_is_none_of_the_forms_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a matrix \[V, H\], a module or a function, not <class 'str'>"):
        as_head("lm_head")  # type: ignore[arg-type]


def test_the_other_models_hidden_states_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[2, 5\].*\[3, 2\].*other model's head"):
        Head(MATRIX)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="hidden states are on meta and the head's matrix on cpu"):
        Head(MATRIX)(HIDDEN.to("meta"))
