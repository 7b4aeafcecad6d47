"""Checkpoints of a sweep: only those of the best arm stay on the disk, unless the sweep asks for more."""

from collections.abc import Sequence
from typing import Any

from opcd.sweep.summary import ArmResult

MEASURES = (("samples/right", "maximize"), ("val/divergence", "minimize"), ("train/divergence", "minimize"))
"""Metrics by which the best arm is chosen: the first one that all finished arms have."""


def keep_the_best(results: Sequence[ArmResult]) -> None:
    """Remove the checkpoints of all arms that finished in this process except the best.

    Only `step=N.ckpt` and its manifest are removed. An arm whose config asks for checkpoints keeps its own.
    """
    finished = [result for result in results if result.task.status == "finished"]
    best = _best(finished)
    if best is None:
        return
    for result in finished:
        if result is best or result.task.before or _asked_for(result.task.job.config):
            continue
        folder = result.task.folder.run / "checkpoints"
        for file in [*folder.glob("step=*.ckpt"), *folder.glob("step=*.ckpt.json")]:
            file.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _best(finished: Sequence[ArmResult]) -> ArmResult | None:
    """The best arm by `MEASURES`; None if no metric decides."""
    for metric, direction in MEASURES:
        if finished and all(metric in result.numbers for result in finished):
            sign = 1 if direction == "minimize" else -1
            return min(finished, key=lambda result: sign * result.numbers[metric])
    return None


def _asked_for(config: dict[str, Any]) -> bool:
    """Whether an arm's config asks for checkpoints."""
    trainer = config.get("trainer") or {}
    callbacks = trainer.get("callbacks") or []
    named = [str(each.get("class_path")) for each in callbacks if isinstance(each, dict)]
    return trainer.get("enable_checkpointing") is True or any("Checkpoint" in name for name in named)
