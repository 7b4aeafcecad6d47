"""The memory of a run, predicted before a weight is loaded: `opcd doctor --plan`."""

from opcd.planning.model_shapes import Model
from opcd.planning.sizes import PHASES, Setting, parts, peak

__all__ = ["PHASES", "Model", "Setting", "parts", "peak"]
