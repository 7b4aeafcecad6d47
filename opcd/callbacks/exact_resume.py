"""Exact resume: what a checkpoint of Lightning's leaves out."""

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from opcd.callbacks.export_student import facts_of
from opcd.checkpoints import check_config
from opcd.modules import Distiller

KEY = "exact_resume"


class ExactResume(Callback):
    """A run that goes on from a checkpoint takes the steps of one that was never stopped, bit for bit on a CPU.

    Adds to a checkpoint, for each rank: the states of the random-number generators of Python, NumPy, torch and the
    rank's GPU (responses are drawn from torch's), and which contexts have been seen, for these are passed through the
    teacher in another way. Where a checkpoint is saved within a step, all of it is as it was before the step.

    Args:
        config: the run's config; the checkpoint holds it, and one that was saved with another config is refused.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config
        self._before: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None
        self._aside: dict[str | None, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Take up a restored state as late as can be, and keep that of the step's beginning."""
        epochs: Any = trainer.fit_loop.epoch_progress
        if epochs.current.started == epochs.current.processed:
            # Lightning leaves this out where it goes on at the end of an epoch, and counts wrongly the next time.
            epochs.increment_ready()
            epochs.increment_started()
        if self._restored is not None:
            _set_state(pl_module, self._restored)
            self._restored = None
        self._before = _state(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training must not notice validation, which sees contexts too."""
        if trainer.state.fn == "fit":
            assert isinstance(pl_module, Distiller)
            self._aside = _prefixes(pl_module)
            total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            total.ready = total.started = total.completed  # of one that begins anew (`_undo_validation`)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what validation has seen."""
        if self._aside is not None:
            assert isinstance(pl_module, Distiller)
            _set_prefixes(pl_module, self._aside)
            self._aside = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all ranks: every rank must save."""
        step = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        within = step["current"]["started"] > step["current"]["processed"]
        if within:
            _undo_batch(step)
        if self._aside is not None:
            _undo_validation(checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"])
        own = self._restored or (self._before if within else _state(pl_module))
        if self._aside is not None:
            own = own | {"prefix": self._aside}
        states: list[Any] = [own] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, own)
        checkpoint[KEY] = states
        if self.config is not None:
            assert isinstance(pl_module, Distiller)
            checkpoint["config"] = self.config
            checkpoint["facts"] = asdict(facts_of(trainer, pl_module))  # for the card of a student exported from it

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep this rank's state for the first step."""
        if trainer.state.fn != "fit":
            return
        if self.config is not None:
            check_config(checkpoint.get("config"), self.config, Path(str(trainer.ckpt_path)))
        states = checkpoint.get(KEY, [])
        if len(states) == trainer.world_size:
            self._restored = _whole(pl_module, states[trainer.global_rank])
        else:
            rank_zero_warn(
                f"the checkpoint holds random-number states of {len(states)} ranks and there are {trainer.world_size}: "
                "the run goes on, but not as it would have without the interruption"
            )


def _state(pl_module: LightningModule) -> dict[str, Any]:
    """Plain values and tensors: a checkpoint is loaded with `weights_only=True`."""
    assert isinstance(pl_module, Distiller)
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - a library may draw from it
    on_gpu = pl_module.device.type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(pl_module.device) if on_gpu else None,
        "prefix": _prefixes(pl_module),
    }


def _whole(pl_module: LightningModule, state: dict[str, Any]) -> dict[str, Any]:
    """A state that can be set, found out while the checkpoint is restored; any error where it cannot."""
    assert isinstance(pl_module, Distiller)
    random.Random().setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.Generator().set_state(state["torch"].cpu())
    seen = {part: state["prefix"][part] for part in pl_module.teacher.parts}
    return {"cuda": state["cuda"], **state, "prefix": seen}


def _set_state(pl_module: LightningModule, state: dict[str, Any]) -> None:
    assert isinstance(pl_module, Distiller)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and pl_module.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), pl_module.device)
    _set_prefixes(pl_module, state["prefix"])


def _prefixes(distiller: Distiller) -> dict[str | None, Any]:
    """What each teacher's shared prefix has seen."""
    return {name: part.prefix.state_dict() for name, part in distiller.teacher.parts.items()}


def _set_prefixes(distiller: Distiller, state: dict[str | None, Any]) -> None:
    for name, part in distiller.teacher.parts.items():
        part.prefix.load_state_dict(state[name])


def _undo_validation(progress: dict[str, Any]) -> None:
    """Lightning's counters of a validation that was left, so that all of it is repeated: the means begin anew, too.

    One batch that has begun is how Lightning knows of it.
    """
    done = progress["current"]["completed"]
    before = progress["total"]["completed"] - done
    progress["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["total"] |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    progress["is_last_batch"] = False


def _undo_batch(progress: dict[str, Any]) -> None:
    """Lightning's counters of batches as they were before the batch that has begun."""
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["started"] = counts["completed"]
    progress["is_last_batch"] = False
