"""Checks of a checkpoint before this run uses it: its contents, its hyper-parameters and its config.

The file may be somebody else's.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from opcd.checkpoints.checkpoint_files import BrokenCheckpoint, read_checkpoint, saved_config
from opcd.runtime.differences import changed_keys
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
FREE = (
    *("model.eval_sampling", "model.micro_batch_tokens", "model.shrink_on_oom", "model.gradient_checkpointing"),
    *("model.shared_prefix", "model.prefix_memory_mib", "model.on_nonfinite"),
    *("data.val", "data.test", "data.predict", "data.eval_batch_size", "data.num_workers"),
)
"""Settings that may change when a run resumes: they change only what is shown, or rounding."""
SERVED = re.compile(r"model\.teacher\..*\.?init_args\.(base_url|api_key_env|concurrency|timeout|patience)")
"""Settings of a teacher's server, which may change too."""


def check_checkpoint(path: Path, now: dict[str, Any], training: bool, verified: bool = False) -> dict[str, Any]:
    """Check that this run can use a checkpoint, before a model is loaded.

    Args:
        path: the checkpoint.
        now: the run's config.
        training: whether training resumes from the checkpoint; else its weights are enough.
        verified: the file has been compared with its manifest already.

    Returns:
        The data module's state in the checkpoint; empty where there is none.

    Raises:
        UserError: names the file, and what is wrong or which keys differ.
    """
    checkpoint = read_checkpoint(path, verified)
    _check_contents(checkpoint, path, training)
    _check_hyper_parameters(checkpoint, now["model"], path)
    then = saved_config(path) or checkpoint.get("config")
    if training:
        check_config(then, now, path)
    else:
        _check_adapter(then, now, path)
    data: dict[str, Any] = checkpoint.get("ContextQueryDataModule", {})
    return data


def check_config(then: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint was saved with the config of this run, as far as the config changes the training.

    Args:
        then: the config that the checkpoint was saved with; None: not known.
        now: the config of this run.
        path: the checkpoint.

    Raises:
        UserError: names the keys that differ.
    """
    changed = [key for key in _changed(then, now, path, _shaping) if not SERVED.fullmatch(key)]
    if changed:
        raise UserError(
            f"{path} was saved with another config; these keys differ: {', '.join(changed)}. Set them as they were "
            f"({path.parent.parent / 'config.yaml'}), or start a new run: without ckpt_path, {_trained_student(path)}"
        )


def _trained_student(path: Path) -> str:
    """The option that starts a new run with the weights of a checkpoint."""
    run = path.parent.parent
    if (run / "student").is_dir():
        return f"and with --model.student.name {run / 'student'} to keep the trained weights"
    return (
        f"and with --model.student.name FOLDER to keep the trained weights, where `opcd export {run} --to merged "
        "--out FOLDER` (--to hf where there is no adapter) writes the folder from the checkpoint"
    )


def _check_adapter(then: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Check that an adapter's weights are loaded over their own base: they would fit another one without an error."""
    if changed := _changed(then, now, path, _adapted):
        raise UserError(
            f"{path} was saved with another student; these keys differ: {', '.join(changed)}. Set them as they were "
            f"({path.parent.parent / 'config.yaml'})"
        )


def _changed(then: Any, now: dict[str, Any], path: Path, part: Callable[[dict[str, Any]], dict[str, Any]]) -> list[str]:
    """The keys at which a part of two configs differs; the first one comes from a file, and is None if not known."""
    if then is None:
        return []
    sections = [then.get(name) for name in ("model", "data", "trainer")] if isinstance(then, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise BrokenCheckpoint(f"{path}: the config in it is not one of `opcd fit`")
    return changed_keys(part(then), json.loads(json.dumps(part(now))))


def _shaping(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that changes the training steps."""
    trainer = {name: config["trainer"].get(name) for name in ("precision", "limit_train_batches")}
    shaping = {"seed_everything": config.get("seed_everything"), "trainer": trainer}
    for part in ("model", "data"):
        shaping[part] = {name: value for name, value in config[part].items() if f"{part}.{name}" not in FREE}
    return shaping


def _adapted(config: dict[str, Any]) -> dict[str, Any]:
    """The adapter and its base; without an adapter, a checkpoint holds all weights, and the base does not matter."""
    model = config["model"]
    if (adapter := model.get("adapter")) is None:
        return {"model": {"adapter": None}}
    student = model["student"] if isinstance(model.get("student"), dict) else {}
    base = {name: student.get(name) for name in ("name", "revision", "quantization")}
    return {"model": {"adapter": adapter, "student": base}}


def _check_contents(checkpoint: dict[str, Any], path: Path, training: bool) -> None:
    """Check that a checkpoint has what Lightning will look for, or raise BrokenCheckpoint."""
    if missing := [key for key in (TRAINING if training else WEIGHTS) if key not in checkpoint]:
        use = "that training can resume from" if training else "of opcd"
        raise BrokenCheckpoint(f"{path} is not a checkpoint {use}: it has no {', '.join(missing)}")
    for key, kind in KINDS.items():
        if key in checkpoint and (not isinstance(checkpoint[key], kind) or isinstance(checkpoint[key], bool)):
            raise BrokenCheckpoint(f"{path} is damaged: its {key} is a {type(checkpoint[key]).__name__}")
    if not isinstance(checkpoint.get("ContextQueryDataModule", {}).get("sha256", {}), dict):
        raise BrokenCheckpoint(f"{path} is damaged: its sha256 of the data is not a dictionary")
    for name, weight in checkpoint["state_dict"].items():
        if not isinstance(name, str) or not isinstance(weight, torch.Tensor):
            raise BrokenCheckpoint(f"{path} is damaged: {name!r} of its state_dict is not a named tensor")


def _check_hyper_parameters(checkpoint: dict[str, Any], model: dict[str, Any], path: Path) -> None:
    """Check that a checkpoint's `hyper_parameters` ask for the model of the config: the config alone counts.

    A checkpoint of `opcd fit` has no such key. UserError names the keys that differ.
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
    keys = []
    for name, value in asked.items():
        key = f"{above}.{name}"
        keys += _other_keys(value, config[name], key) if name in config else [key]
    return keys


def _same(asked: Any, config: Any) -> bool:
    """Whether two plain values are equal; true is not 1, and a tensor equals nothing."""
    if isinstance(asked, list | tuple):
        return isinstance(config, list) and len(asked) == len(config) and all(map(_same, asked, config))
    if isinstance(asked, dict):
        return isinstance(config, dict) and asked.keys() == config.keys() and not _other_keys(asked, config)
    plain = type(asked) in (type(None), bool, int, float, str) and isinstance(asked, bool) == isinstance(config, bool)
    return plain and bool(asked == config)
