"""Checks of a checkpoint's contents, before anything of it is used: the file may be somebody else's."""

from pathlib import Path
from typing import Any

import torch

from opcd.checkpoints.checkpoint_files import BrokenCheckpoint
from opcd.runtime.errors import UserError

KINDS: dict[str, type | tuple[type, ...]] = {
    "state_dict": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "exact_resume": list,
    "config": (dict, type(None)),
    "facts": dict,
    "teacher": dict,
    "bad_steps": (list, tuple),
    "hyper_parameters": (dict, type(None)),
    "ContextQueryDataModule": dict,
}
"""The type of the value at each key, where the key is there."""
WEIGHTS = ("state_dict",)
TRAINING = (*WEIGHTS, "pytorch-lightning_version", "epoch", "global_step", "loops", "optimizer_states", "lr_schedulers")
"""The keys that training needs to resume."""


def check_contents(checkpoint: dict[str, Any], path: Path, training: bool) -> None:
    """Check that a checkpoint has what Lightning will look for.

    Args:
        checkpoint: the contents of the file.
        path: the file.
        training: whether training resumes from the checkpoint; else its weights are enough.

    Raises:
        BrokenCheckpoint: names the file, and what is wrong.
    """
    if missing := [key for key in (TRAINING if training else WEIGHTS) if key not in checkpoint]:
        use = "that training can resume from" if training else "of opcd"
        raise BrokenCheckpoint(f"{path} is not a checkpoint {use}: it has no {', '.join(missing)}")
    for key, kind in KINDS.items():
        if key in checkpoint and (not isinstance(checkpoint[key], kind) or isinstance(checkpoint[key], bool)):
            raise BrokenCheckpoint(
                f"{path} is not a complete checkpoint: its {key} is a {type(checkpoint[key]).__name__}"
            )
    if not isinstance(checkpoint.get("ContextQueryDataModule", {}).get("sha256", {}), dict):
        raise BrokenCheckpoint(f"{path} is not a complete checkpoint: its sha256 of the data is not a dictionary")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise BrokenCheckpoint(
                f"{path} is not a complete checkpoint: {name!r} of its state_dict is not a named tensor"
            )


def check_hyper_parameters(checkpoint: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint's `hyper_parameters` ask for the model of the config: the config alone counts.

    Args:
        checkpoint: the checkpoint; one of `opcd fit` has no such key.
        model: the config's section `model`.
        path: the file.

    Raises:
        UserError: names the keys that differ.
    """
    asked = dict(checkpoint.get("hyper_parameters") or {})
    asked.pop("_instantiator", None)
    if keys := _other_keys(asked, model):
        raise UserError(
            f"{path}: its hyper_parameters differ from the config at {', '.join(keys)}. The config alone decides: set "
            "these keys as you want them and remove hyper_parameters from the checkpoint, or take another checkpoint"
        )


def _other_keys(asked: Any, config: Any, above: str = "model") -> list[str]:
    """Dotted keys of `asked` that the config lacks, or has with another value."""
    if not isinstance(asked, dict) or not isinstance(config, dict):
        return [] if _same(asked, config) else [above]
    return [
        key
        for name, value in asked.items()
        for key in (_other_keys(value, config[name], f"{above}.{name}") if name in config else [f"{above}.{name}"])
    ]


def _same(asked: Any, config: Any) -> bool:
    """Whether two plain values are equal; true is not 1, and a tensor equals nothing."""
    if isinstance(asked, list | tuple):
        return isinstance(config, list) and len(asked) == len(config) and all(map(_same, asked, config))
    if isinstance(asked, dict):
        return (
            isinstance(config, dict)
            and asked.keys() == config.keys()
            and all(_same(asked[k], config[k]) for k in asked)
        )
    plain = type(asked) in (type(None), bool, int, float, str) and isinstance(asked, bool) == isinstance(config, bool)
    return plain and bool(asked == config)
