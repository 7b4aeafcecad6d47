"""`ckpt_path: last`: the newest whole checkpoint under a folder of runs."""

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
    *(
        "model.eval_sampling",
        "model.micro_batch_tokens",
        "model.shrink_on_oom",
        "model.gradient_checkpointing",
        "model.shared_prefix",
    ),
    *("model.prefix_memory_mib", "model.on_nonfinite"),
    *("data.val", "data.test", "data.predict", "data.eval_batch_size", "data.num_workers"),
)
"""Settings that may change when a run goes on: they change what is shown, or rounding."""
NUMBERED = re.compile(r"version_(?P<number>[0-9]{1,18})")
SERVED = re.compile(r"model\.teacher\..*\.?init_args\.(base_url|api_key_env|concurrency|timeout|patience)")
"""So may where a teacher is served, and how patiently it is asked."""


def newest_whole(root: Path) -> Path | None:
    """The newest whole checkpoint of the runs under `root` (version_N/checkpoints/*.ckpt); None where there is none.

    A broken one is passed over, with a warning that names it and what is taken in its place.

    Raises:
        UserError: there are checkpoints, and all of them are broken.
    """
    path = _first_whole(_newest_first(root), "ckpt_path: last", root)
    if path is None:
        rank_zero_info(f"ckpt_path: last: there is no checkpoint under {root} yet; training begins at step 0")
    return path


def newest_of_run(run: Path) -> Path | None:
    """The newest whole checkpoint of one run (checkpoints/*.ckpt); otherwise as `newest_whole`."""
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
        raise UserError(f"{asked}: no checkpoint under {where} is whole: {'; '.join(broken)}")
    return None


def check_checkpoint(path: Path, now: dict[str, Any], training: bool, verified: bool = False) -> dict[str, Any]:
    """Refuse a checkpoint that this run cannot use, before anything is loaded.

    Args:
        path: the checkpoint.
        now: the run's config.
        training: whether training is to go on from it; else its weights are enough.
        verified: its file has been compared with its manifest.

    Returns:
        What it says of the data that it was trained on; empty where it says nothing.

    Raises:
        UserError: names the file, and what is wrong or which keys differ.
    """
    checkpoint = check_contents(read_checkpoint(path, verified), path, training)
    check_hyper_parameters(checkpoint, now["model"], path)
    then = saved_config(path) or checkpoint.get("config")
    if training:
        check_config(then, now, path)
    else:
        _check_adapter(then, now, path)
    data: dict[str, Any] = checkpoint.get("ContextQueryDataModule", {})
    return data


def check_config(then: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Refuse to go on from a checkpoint of another config.

    Args:
        then: the config that the checkpoint was saved with; None where it is not known.
        now: that of this run.
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
            f"({path.parent.parent / 'config.yaml'}), or begin a new run: without ckpt_path, {_trained_student(path)}"
        )


def _trained_student(path: Path) -> str:
    """How a new run begins with what a checkpoint has learnt."""
    run = path.parent.parent
    if (run / "student").is_dir():
        return f"and to keep what was learnt with --model.student.name {run / 'student'}"
    return (
        f"and to keep what was learnt with --model.student.name FOLDER, which "
        f"`opcd export {run} --to merged --out FOLDER` (--to hf where there is no adapter) writes out of the checkpoint"
    )


def _check_adapter(then: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """The weights of an adapter mean nothing over another base, and fit it all the same."""
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
    """The adapter, and what it stands on; of a student without one nothing: all of its weights are in a checkpoint."""
    if (adapter := model.get("adapter")) is None:
        return {"adapter": None}
    student = model["student"] if isinstance(model.get("student"), dict) else {}
    return {"adapter": adapter, "student": {name: student.get(name) for name in ("name", "revision", "quantization")}}


def _check_sections(config: Any, path: Path) -> None:
    """Refuse what is no config of `opcd fit`: it stands in a file."""
    sections = [config.get(name) for name in ("model", "data", "trainer")] if isinstance(config, dict) else [None]
    if not all(isinstance(section, dict) for section in sections):
        raise BrokenCheckpoint(f"{path}: the config in it is none of `opcd fit`")


def saved_config(path: Path) -> dict[str, Any] | None:
    """The config that a checkpoint's manifest holds; None where there is none."""
    with suppress(BrokenCheckpoint):
        config: dict[str, Any] | None = read_manifest(path)["config"]
        return config
    return None


def _shaping(config: dict[str, Any]) -> dict[str, Any]:
    """What changes the training steps."""
    trainer = {name: config["trainer"].get(name) for name in ("precision", "limit_train_batches")}
    shaping = {"seed_everything": config.get("seed_everything"), "trainer": trainer}
    for part in ("model", "data"):
        shaping[part] = {name: value for name, value in config[part].items() if f"{part}.{name}" not in FREE}
    return shaping


def _newest_first(root: Path) -> Iterator[Path]:
    """Checkpoints of the newest run first, in each the one of the most steps."""
    named = [(NUMBERED.fullmatch(path.name), path) for path in root.glob("version_*") if path.is_dir()]
    runs = [(int(found["number"]), path) for found, path in named if found]
    for _, run in sorted(runs, reverse=True):
        yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Path]:
    yield from sorted((run / "checkpoints").glob("*.ckpt"), key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    step = sys.maxsize  # one without a readable manifest is named, not passed over in silence
    with suppress(BrokenCheckpoint):
        step = read_manifest(path)["step"] or 0
    with suppress(OSError):
        return step, path.lstat().st_mtime_ns
    return step, 0
