"""Folders that somebody else made: read within bounds, before transformers and peft read them."""

from opcd.folders.adapter import ADAPTER, base_name, lora_settings
from opcd.folders.limits import Budget, explain, oversized
from opcd.folders.model import check_model_folder, check_weights, has_pickles_only, weight_budget

__all__ = [
    "ADAPTER",
    "Budget",
    "base_name",
    "check_model_folder",
    "check_weights",
    "explain",
    "has_pickles_only",
    "lora_settings",
    "oversized",
    "weight_budget",
]
