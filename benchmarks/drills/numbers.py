"""Drills of non-finite losses, teacher states and gradients."""

import hashlib
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.drills.fits import STEPS, Child, Fits, Outcome
from opcd.modules import Distiller, FrozenTeacher
from opcd.modules.lm.hidden_states import HiddenStates
from opcd.modules.objective import Objective
from opcd.modules.step.runner import Ranks, Step

PLACES = ("loss", "teacher", "gradients")


def numbers(runs: int, folder: Path) -> Outcome:
    """Check that there is no step, that no weight changes, that the batch is saved, and that the run stops or skips."""
    outcome = Outcome()
    modes: list[dict[str, Any]] = [{"action": "stop"}, {"action": "skip"}, {"action": "skip", "most_in_a_row": 2}]
    fits = [Fits(folder / str(number), model={"on_nonfinite": mode}) for number, mode in enumerate(modes)]
    for number in range(runs):
        place, mode = PLACES[number % 3], number // 3 % 3
        draw = random.Random(number)
        value, at = draw.choice([float("nan"), float("inf"), -float("inf")]), draw.randrange(1, STEPS - 4)
        last = at if mode < 2 else at + 2
        root = folder / f"{place}-{number}"
        child = fits[mode].start(root, before=partial(_spoil, place, at, last, value))
        outcome.add(_judged(child, root, mode, f"{value} in {place} of step {at}, {modes[mode]}"))
    return outcome


def _judged(child: Child, root: Path, mode: int, what: str) -> str | None:
    code, text = child.wait(), child.text
    bad = (1, 1, 3)[mode]
    if code != (2, 0, 2)[mode] or "Traceback" in text:
        return f"{what}: exit code {code}: {text[-400:]}"
    unchanged = re.findall(r"UNCHANGED (\w+)", text)
    if unchanged != ["True"] * bad:
        return f"{what}: weights unchanged: {unchanged}, instead of {bad} times True"
    kept = [json.loads(file.read_text()) for file in root.rglob("bad_batches/*.json")]
    if len(kept) != bad or not all(
        len(one["rows"]) == len(one["responses"]) == 2 and one["problem"] in text for one in kept
    ):
        return f"{what}: {len(kept)} batches are kept"
    return None


def _spoil(place: str, first: int, last: int, value: float) -> None:
    """Put a value into the computation of steps `first` to `last`, counted from 0, and print whether weights change."""
    begun = -1
    training_step, optimize = Distiller.training_step, Step.optimize
    measure, backward = Objective.__call__, Ranks.backward

    def spoilt() -> bool:
        return first <= begun <= last

    def counted(self: Distiller, *args: Any) -> None:
        nonlocal begun
        begun += 1
        training_step(self, *args)

    def loss(self: Objective, student: HiddenStates, teacher: HiddenStates, *args: Any) -> dict[str, torch.Tensor]:
        if spoilt() and place == "teacher":
            teacher.hidden[0, 0] = value
        values = measure(self, student, teacher, *args)
        if spoilt() and place == "loss":
            values |= {name: values[name] * value for name in ("divergence", "loss") if name in values}
        return values

    def gradients(self: Ranks, module: Distiller, *args: Any) -> None:
        backward(self, module, *args)
        if spoilt() and place == "gradients":
            next(p for p in module.student.parameters() if p.grad is not None).grad.view(-1)[7] = value  # type: ignore[union-attr]

    def watched(self: Step, *args: Any) -> None:
        if not spoilt():
            return optimize(self, *args)
        before = _digest(self.module)
        try:
            return optimize(self, *args)
        finally:
            print("UNCHANGED", before == _digest(self.module), flush=True)

    Distiller.training_step = counted  # type: ignore[method-assign]
    Ranks.backward = gradients  # type: ignore[method-assign, assignment]
    Step.optimize = watched  # type: ignore[method-assign]
    Objective.__call__ = loss  # type: ignore[method-assign]


def _digest(distiller: Distiller) -> str:
    """SHA-256 of the weights of student and teacher and of the optimizer's state."""
    optimizer: Any = distiller.optimizers()
    tensors = [*distiller.student.parameters(), *optimizer.param_groups[0]["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    if not isinstance(distiller.teacher, FrozenTeacher):
        tensors += distiller.teacher.model.parameters()
    digest = hashlib.sha256(str(optimizer.param_groups[0]["lr"]).encode())
    for tensor in tensors:
        digest.update(tensor.detach().numpy().tobytes())
    return digest.hexdigest()
