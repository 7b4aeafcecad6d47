"""What happens to a checkpoint while it is saved, and on the disk: kill -9 at any point, a full disk, damaged files."""

import os
import random
import shutil
import signal
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.drills.fits import STEPS, Child, Fits, Outcome, differences, last_checkpoint, saving
from opcd.checkpoints import SafeCheckpointIO, newest_whole, read_checkpoint
from opcd.checkpoints import checkpoint_files as files
from opcd.checkpoints.checkpoint_files import manifest_of

WORK_IS_DONE = 0


def saves(runs: int, folder: Path) -> Outcome:
    """kill -9 at points of a save of a real checkpoint: the new one or the one before can be loaded."""
    checkpoint, outcome = _a_checkpoint(folder), Outcome()
    counter = Child.start(lambda: _save(checkpoint, folder / "points", 10**9), folder / "points.log")
    assert counter.wait() == WORK_IS_DONE, counter.text
    kinds = counter.text.rsplit("POINTS", 1)[1].split()
    others = [point for point, kind in enumerate(kinds) if kind != "write"]  # few, and the tricky ones
    for number in range(runs):
        draw = random.Random(number)
        root, again = folder / f"save-{number}", number % 2 == 1
        point = draw.randrange(len(kinds)) if number % 5 == 0 else draw.choice(others)
        elsewhere = "/dev/shm" if number % 4 > 1 else str(folder)
        child = Child.start(lambda r=root, p=point, a=again, t=elsewhere: _save(checkpoint, r, p, a, t), root / "log")
        child.wait()
        outcome.add(_after_kill(child, root, checkpoint, f"{root.name}: point {point} of {len(kinds)}, {kinds[point]}"))
        shutil.rmtree(root)
    return outcome


def _a_checkpoint(folder: Path) -> dict[str, Any]:
    fits = Fits(folder)
    child = fits.start(folder / "whole", "--trainer.max_steps", 2)
    assert child.wait() == 0, child.text
    return last_checkpoint(folder / "whole", 2)


def _at(checkpoint: dict[str, Any], step: int) -> dict[str, Any]:
    """The checkpoint as of another step, so that each can be told from the others."""
    weights = {name: weight + step for name, weight in checkpoint["state_dict"].items()}
    return {**checkpoint, "global_step": step, "state_dict": weights}


def _save(checkpoint: dict[str, Any], root: Path, point: int, again: bool = False, tmp: str = "/tmp") -> int:
    """Save steps 1 and 2, then 3 (or 2 again), struck at `point`; then remove step 1. In a process of its own."""
    os.environ["TMPDIR"], tempfile.tempdir = tmp, None
    folder, io = root / "version_0" / "checkpoints", SafeCheckpointIO()
    for step in (1, 2):
        io.save_checkpoint(_at(checkpoint, step), folder / f"step={step}.ckpt")
    struck = _strike_at(point)
    io.save_checkpoint(_at(checkpoint, 3), folder / f"step={2 if again else 3}.ckpt")
    io.remove_checkpoint(folder / "step=1.ckpt")
    print("POINTS", *struck)
    return WORK_IS_DONE


def _strike_at(point: int) -> list[str]:
    """Let this process kill itself at the `point`-th write, fsync, rename or removal from now on; those it passed."""
    passed: list[str] = []

    def struck(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(passed) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            passed.append(kind)
            return function(*args, **kwargs)

        return call

    files._Hashing.write = struck("write", files._Hashing.write)  # type: ignore[method-assign]
    for name in ("fsync", "replace", "unlink", "rename"):
        setattr(os, name, struck(name, getattr(os, name)))
    return passed


def _after_kill(child: Child, root: Path, checkpoint: dict[str, Any], at: str) -> str | None:
    if child.code != -9:
        return f"{at}: exit code {child.code}: {child.text[-300:]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is broken: what is not whole has no name
            found = newest_whole(root)
        loaded = read_checkpoint(found) if found else {"global_step": 0}
    except Exception as error:
        return f"{at}: {type(error).__name__}: {error}"
    if loaded["global_step"] not in (2, 3):
        return f"{at}: what is left is step {loaded['global_step']}"
    return "not what was saved" if differences(loaded, _at(checkpoint, loaded["global_step"])) else None


def disk(runs: int, folder: Path) -> Outcome:
    """A disk that is full, before a third save of 24 MiB and in the middle of it: exit 2, or going on as configured."""
    outcome = Outcome()
    for number in range(runs):
        go_on, within = number % 2 == 1, number % 4 > 1
        fits = Fits(folder / str(number), trainer=saving(2, disk_full="go_on" if go_on else "stop"))
        with small_disk(folder / f"disk-{number}", mib=66 + number % 6) as root:
            child = fits.start(root, "--trainer.max_steps", 10, before=_believe_in_space if within else None)
            outcome.add(_after_full_disk(child, root, go_on))
    return outcome


def _believe_in_space() -> None:
    """The disk is filled by somebody else after there was room."""
    files._check_space = lambda checkpoint, path: None


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """A tmpfs of its own, which takes root."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def _after_full_disk(child: Child, root: Path, go_on: bool) -> str | None:
    code, text = child.wait(), child.text
    saved = sorted(path.name for path in root.glob("version_*/checkpoints/*.ckpt"))
    if code != (0 if go_on else 2) or "Traceback" in text or "no room for the checkpoint" not in text:
        return f"exit code {code}, disk_full {'go_on' if go_on else 'stop'}: {text[-400:]}"
    if saved != ["step=2.ckpt", "step=4.ckpt"] or list(root.rglob("*-being-written")):
        return f"left are {saved} and {list(root.rglob('*-being-written'))}"
    path = newest_whole(root)
    if path is None or read_checkpoint(path)["global_step"] != 4:
        return f"the newest is {path}"
    return None


def damage(runs: int, folder: Path) -> Outcome:
    """A bit flipped, an end cut off, a manifest gone: found, and the one before is taken."""
    outcome = Outcome()
    fits = Fits(folder)
    child = fits.start(folder / "whole")
    assert child.wait() == 0, child.text
    newest = newest_whole(folder / "whole")
    assert newest is not None and newest.name == f"step={STEPS}.ckpt"
    for number in range(runs):
        outcome.add(_damaged(folder / "whole", newest, random.Random(number), number))
    return outcome


def _damaged(root: Path, newest: Path, draw: random.Random, number: int) -> str | None:
    target = manifest_of(newest) if number % 4 == 3 else newest
    original = target.read_bytes()
    what = _harm(target, original, draw, number)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = newest_whole(root)
        warned = any("Going on from" in str(warning.message) for warning in said)
        if found is None or found.name != f"step={STEPS - 2}.ckpt" or not warned:
            return f"{what}: {found} is taken, warned: {warned}"
        return None if read_checkpoint(found)["global_step"] == STEPS - 2 else "the other cannot be loaded"
    finally:
        target.write_bytes(original)


def _harm(target: Path, original: bytes, draw: random.Random, number: int) -> str:
    if number % 2:
        place = draw.randrange(len(original) * 8)
        harmed = bytearray(original)
        harmed[place // 8] ^= 1 << place % 8
        target.write_bytes(harmed)
        return f"{target.name}, bit {place} flipped"
    length = draw.randrange(len(original))
    target.write_bytes(original[:length])
    return f"{target.name} cut to {length} bytes"
