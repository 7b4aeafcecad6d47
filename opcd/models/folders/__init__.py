"""Folders that somebody else made: read within bounds, before transformers and peft read them."""

from opcd.models.folders.adapter_folder import ADAPTER, base_name, lora_settings
from opcd.models.folders.config_limits import Budget, explain, oversized
from opcd.models.folders.model_folder import check_model_folder, check_weights, has_pickles_only, weight_budget

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
