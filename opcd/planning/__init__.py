"""The memory of a step on paper, from configs alone: `opcd doctor --plan`."""

from opcd.planning.model_shapes import Shape, Weights, shape_of
from opcd.planning.parts import Part, parts, peak
from opcd.planning.setting import Setting
from opcd.planning.sizes import PHASES

__all__ = ["PHASES", "Part", "Setting", "Shape", "Weights", "parts", "peak", "shape_of"]
