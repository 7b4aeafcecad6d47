"""Configs as plain values, and the keys at which two of them differ."""

from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser


def plain_config(parser: "LightningArgumentParser", config: Any) -> dict[str, Any]:
    """A parsed config as plain values, without trainer.default_root_dir."""
    plain: dict[str, Any] = yaml.safe_load(parser.dump(config, skip_unset=False, format="yaml"))
    plain["trainer"].pop("default_root_dir")
    return plain


def changed_keys(old: Any, new: Any, above: str = "") -> list[str]:
    """Dotted keys at which two plain values differ."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return [] if old == new else [above]
    changed = []
    for key in dict.fromkeys((*old, *new)):
        name = f"{above}.{key}".strip(".")
        both = key in old and key in new
        changed += changed_keys(old[key], new[key], name) if both else [name]
    return changed
