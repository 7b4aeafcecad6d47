"""The kinds of a model's layers: full attention, sliding windows, recurrent states."""

from transformers import PreTrainedModel


def layer_kinds(model: PreTrainedModel) -> set[str]:
    """The kinds of the model's layers; empty if its config does not name them."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or [])


def sliding_window(model: PreTrainedModel) -> int | None:
    """The number of tokens that a sliding-window layer sees, its own included; None if no layer has a window."""
    window: int | None = getattr(model.config.get_text_config(), "sliding_window", None)
    return None if layer_kinds(model) == {"full_attention"} else window
