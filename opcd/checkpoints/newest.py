"""The newest complete checkpoint under a folder of runs (`ckpt_path: last`), and whether this run can use it."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.checkpoints.checkpoint_files import BrokenCheckpoint, read_checkpoint, read_manifest, verify
from opcd.checkpoints.contents import check_contents, check_hyper_parameters
from opcd.runtime.differences import changed_keys
from opcd.runtime.errors import UserError

FREE = (
    *("model.eval_sampling", "model.micro_batch_tokens", "model.shrink_on_oom", "model.gradient_checkpointing"),
    *("model.shared_prefix", "model.prefix_memory_mib", "model.on_nonfinite"),
    *("data.val", "data.test", "data.predict", "data.eval_batch_size", "data.num_workers"),
)
"""Settings that may change when a run resumes: they change only what is shown, or rounding."""
NUMBERED = re.compile(r"version_(?P<number>[0-9]{1,18})")
SERVED = re.compile(r"model\.teacher\..*\.?init_args\.(base_url|api_key_env|concurrency|timeout|patience)")
"""Settings of a teacher's server, which may change too."""


def newest_whole(root: Path) -> Path | None:
    """Find the newest complete checkpoint of the runs under `root` (version_N/checkpoints/*.ckpt); None: there is none.

    A broken checkpoint is skipped with a warning that names it, and the one that is used instead.

    Raises:
        UserError: there are checkpoints, and all of them are broken.
    """
    path = _first_whole(_newest_first(root), "ckpt_path: last", root)
    if path is None:
        rank_zero_info(f"ckpt_path: last: there is no checkpoint under {root} yet; training starts at step 0")
    return path


def newest_of_run(run: Path) -> Path | None:
    """Find the newest complete checkpoint of one run (checkpoints/*.ckpt); otherwise as `newest_whole`."""
    return _first_whole(_of_run(run), str(run), run)


def _first_whole(paths: Iterator[Path], asked: str, where: Path) -> Path | None:
    broken: list[str] = []
    for path in paths:
        try:
            manifest = verify(path)
        except BrokenCheckpoint as error:
            broken.append(str(error))
            continue
        if broken:
            rank_zero_warn(f"{'; '.join(broken)}. Going on from {path} (step {manifest['step']}) instead")
        return path
    if broken:
        raise UserError(f"{asked}: no checkpoint under {where} is complete: {'; '.join(broken)}")
    return None


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
    check_contents(checkpoint, path, training)
    check_hyper_parameters(checkpoint, now["model"], path)
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
    if then is None:
        return
    _check_sections(then, path)
    keys = changed_keys(_shaping(then), json.loads(json.dumps(_shaping(now))))
    changed = [key for key in keys if not SERVED.fullmatch(key)]
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
    if then is None:
        return
    _check_sections(then, path)
    old, new = (_adapted(config["model"]) for config in (then, json.loads(json.dumps(now))))
    if old != new and (changed := changed_keys(old, new, "model")):
        raise UserError(
            f"{path} was saved with another student; these keys differ: {', '.join(changed)}. Set them as they were "
            f"({path.parent.parent / 'config.yaml'})"
        )


def _adapted(model: dict[str, Any]) -> dict[str, Any]:
    """The adapter and its base; without an adapter, a checkpoint holds all weights, and the base does not matter."""
    if (adapter := model.get("adapter")) is None:
        return {"adapter": None}
    student = model["student"] if isinstance(model.get("student"), dict) else {}
    return {"adapter": adapter, "student": {name: student.get(name) for name in ("name", "revision", "quantization")}}


def _check_sections(config: Any, path: Path) -> None:
    """Check that a config, which comes from a file, is one of `opcd fit`."""
    sections = [config.get(name) for name in ("model", "data", "trainer")] if isinstance(config, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise BrokenCheckpoint(f"{path}: the config in it is not one of `opcd fit`")


def saved_config(path: Path) -> dict[str, Any] | None:
    """Read the config in a checkpoint's manifest; None where there is none."""
    with suppress(BrokenCheckpoint):
        config: dict[str, Any] | None = read_manifest(path)["config"]
        return config
    return None


def _shaping(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that changes the training steps."""
    trainer = {name: config["trainer"].get(name) for name in ("precision", "limit_train_batches")}
    shaping = {"seed_everything": config.get("seed_everything"), "trainer": trainer}
    for part in ("model", "data"):
        shaping[part] = {name: value for name, value in config[part].items() if f"{part}.{name}" not in FREE}
    return shaping


def _newest_first(root: Path) -> Iterator[Path]:
    """The checkpoints of the newest run first; in each run, that with the most steps first."""
    named = [(NUMBERED.fullmatch(path.name), path) for path in root.glob("version_*") if path.is_dir()]
    runs = [(int(found["number"]), path) for found, path in named if found]
    for _, run in sorted(runs, reverse=True):
        yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Path]:
    return iter(sorted((run / "checkpoints").glob("*.ckpt"), key=_age, reverse=True))


def _age(path: Path) -> tuple[int, int]:
    step = sys.maxsize  # a checkpoint without a readable manifest comes first, so that a warning names it
    with suppress(BrokenCheckpoint):
        step = read_manifest(path)["step"] or 0
    with suppress(OSError):
        return step, path.lstat().st_mtime_ns
    return step, 0
