"""Exact resume: the state that Lightning's checkpoints leave out."""

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
    """Makes a resumed run take the same steps as an uninterrupted one, bit for bit on a CPU.

    Adds to a checkpoint, for each rank: the states of the random-number generators of Python, NumPy, torch and the
    rank's GPU (responses are drawn from torch's), the contexts that the teacher has seen, because it computes those
    differently, and the responses that a rollout replays. A checkpoint that is saved within a step holds the state
    before that step.

    Args:
        config: the run's config. It is saved in the checkpoint; a checkpoint of another config raises an error.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        self.config = config
        self._before: dict[str, Any] = {}
        self._restored: dict[str, Any] | None = None
        self._aside: dict[str | None, Any] | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Restore the state of the checkpoint as late as possible, and record the state before the step."""
        epochs: Any = trainer.fit_loop.epoch_progress
        if epochs.current.started == epochs.current.processed:
            # Lightning omits this when it resumes at the end of an epoch, and then miscounts.
            epochs.increment_ready()
            epochs.increment_started()
        if self._restored is not None:
            _set_state(pl_module, self._restored)
            self._restored = None
        self._before = _state(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set aside the seen contexts: validation must not change training."""
        if trainer.state.fn == "fit":
            assert isinstance(pl_module, Distiller)
            self._aside = _prefixes(pl_module)
            total: Any = trainer.fit_loop.epoch_loop.val_loop.batch_progress.total
            total.ready = total.started = total.completed  # for `_undo_validation`

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the contexts that training has seen."""
        if self._aside is not None:
            assert isinstance(pl_module, Distiller)
            _set_prefixes(pl_module, self._aside)
            self._aside = None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all ranks. Every rank must call this."""
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
            checkpoint["facts"] = asdict(facts_of(trainer, pl_module))  # for the model card of an export

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
                "the run continues, but its steps differ from those of an uninterrupted run"
            )


def _state(pl_module: LightningModule) -> dict[str, Any]:
    """The state as plain values and tensors: a checkpoint is loaded with `weights_only=True`."""
    assert isinstance(pl_module, Distiller)
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - a library may use it
    on_gpu = pl_module.device.type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(pl_module.device) if on_gpu else None,
        "prefix": _prefixes(pl_module),
        "rollout": [part.state_dict() for part in pl_module.rollout.parts],
    }


def _whole(pl_module: LightningModule, state: dict[str, Any]) -> dict[str, Any]:
    """A checked copy of a checkpoint's state: any error is raised now, and not in the first step."""
    assert isinstance(pl_module, Distiller)
    random.Random().setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.RandomState().set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.Generator().set_state(state["torch"].cpu())
    seen = {part: state["prefix"][part] for part in pl_module.teacher.parts}
    rollouts = [dict(part) for part in state.get("rollout", [])]  # an older checkpoint has none
    return {"cuda": state["cuda"], **state, "prefix": seen, "rollout": rollouts}


def _set_state(pl_module: LightningModule, state: dict[str, Any]) -> None:
    assert isinstance(pl_module, Distiller)
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and pl_module.device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), pl_module.device)
    _set_prefixes(pl_module, state["prefix"])
    for part, own in zip(pl_module.rollout.parts, state["rollout"], strict=False):
        part.load_state_dict(own)


def _prefixes(distiller: Distiller) -> dict[str | None, Any]:
    """The state of each teacher's prefix cache."""
    return {name: part.prefix.state_dict() for name, part in distiller.teacher.parts.items()}


def _set_prefixes(distiller: Distiller, state: dict[str | None, Any]) -> None:
    for name, part in distiller.teacher.parts.items():
        part.prefix.load_state_dict(state[name])


def _undo_validation(progress: dict[str, Any]) -> None:
    """Reset Lightning's counters of an interrupted validation, so that it is repeated from its first batch.

    One started batch tells Lightning that there is a validation to repeat.
    """
    done = progress["current"]["completed"]
    before = progress["total"]["completed"] - done
    progress["current"] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    progress["total"] |= {"ready": before + 1, "started": before + 1, "processed": before, "completed": before}
    progress["is_last_batch"] = False


def _undo_batch(progress: dict[str, Any]) -> None:
    """Reset Lightning's batch counters to their values before the started batch."""
    for counts in (progress["total"], progress["current"]):
        counts["ready"] = counts["started"] = counts["completed"]
    progress["is_last_batch"] = False
