"""`ckpt_path: last`: the newest whole checkpoint under a folder of runs."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.changes import changed_keys
from opcd.checkpoints.files import BrokenCheckpoint, read_manifest, verify
from opcd.errors import UserError

FREE = (
    *(
        "model.answer",
        "model.micro_batch_tokens",
        "model.halve_micro_batches",
        "model.gradient_checkpointing",
        "model.shared_prefix",
    ),
    *("model.prefix_memory_mib", "model.bad_numbers"),
    *("data.val", "data.test", "data.predict", "data.eval_batch_size", "data.num_workers"),
)
"""Settings that may change when a run goes on: they change what is shown, or rounding."""
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


def check_config(then: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another config.

    Args:
        then: the config that the checkpoint was saved with; None where it is not known.
        now: that of this run.
        path: the checkpoint.

    Raises:
        UserError: names the keys that differ.
    """
    if then is None:
        return
    keys = changed_keys(_shaping(then), json.loads(json.dumps(_shaping(now))))
    changed = [key for key in keys if not SERVED.fullmatch(key)]
    if changed:
        raise UserError(
            f"{path} was saved with another config; these keys differ: {', '.join(changed)}. Set them as they were "
            f"({path.parent.parent / 'config.yaml'}), or begin a new run without ckpt_path"
        )


def saved_config(path: Path) -> dict[str, Any] | None:
    """The config that a checkpoint's manifest holds; None where there is none."""
    with suppress(BrokenCheckpoint):
        config: dict[str, Any] | None = read_manifest(path)["config"]
        return config
    return None


def _shaping(config: dict[str, Any]) -> dict[str, Any]:
    """What changes the training steps."""
    trainer = {name: config["trainer"].get(name) for name in ("precision", "limit_train_batches")}
    shaping = {"seed_everything": config["seed_everything"], "trainer": trainer}
    for part in ("model", "data"):
        shaping[part] = {name: value for name, value in config[part].items() if f"{part}.{name}" not in FREE}
    return shaping


def _newest_first(root: Path) -> Iterator[Path]:
    """Checkpoints of the newest run first, in each the one of the most steps."""
    runs = [(int(number), path) for path in root.glob("version_*") if (number := path.name[8:]).isdigit()]
    for _, run in sorted(runs, reverse=True):
        yield from _of_run(run)


def _of_run(run: Path) -> Iterator[Path]:
    yield from sorted((run / "checkpoints").glob("*.ckpt"), key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    step = sys.maxsize  # one without a readable manifest is named, not passed over in silence
    with suppress(BrokenCheckpoint):
        step = read_manifest(path)["step"]
    return step, path.stat().st_mtime_ns
