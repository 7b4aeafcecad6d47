"""The newest complete checkpoint under a folder of runs (`ckpt_path: last`)."""

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from opcd.checkpoints.checkpoint_files import BrokenCheckpoint, read_manifest, verify
from opcd.runtime.errors import UserError

NUMBERED = re.compile(r"version_(?P<number>[0-9]{1,18})")


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
