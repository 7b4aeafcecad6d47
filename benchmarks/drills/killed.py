"""kill -9 at random moments of a step, twice within one epoch, and a resume to the end."""

import random
import time
from pathlib import Path

from benchmarks.drills.fits import BATCH, ROWS, Child, Fits, Outcome, history, saving, unlike


def killed(runs: int, folder: Path) -> Outcome:
    """Compare with an uninterrupted run: responses, metrics, weights, optimizer and generators are bit-equal."""
    fits, outcome = Fits(folder, trainer=saving(1)), Outcome()
    begun = time.monotonic()
    whole = fits.finished(folder / "whole")
    a_step = (time.monotonic() - begun) / 40  # about: half of it is not training
    for number in range(runs):
        outcome.add(_try(fits, folder / f"killed-{number}", whole, random.Random(number), a_step))
    return outcome


def _try(fits: Fits, root: Path, whole: Child, draw: random.Random, a_step: float) -> str | None:
    epoch = ROWS // BATCH
    children = []  # at most 5 and 3 steps are begun before the two kills, so both can lie in the first epoch of 6
    for least, most in ((1, epoch - 2), (1, 2)):
        child = fits.start(root)
        child.wait_for("RESPONSES", draw.randint(least, most))
        time.sleep(draw.uniform(0, a_step))
        child.strike()
        if child.wait() != -9:
            return f"{root.name}: exit code {child.code} before it was killed: {child.text[-300:]}"
        children.append(child)
    begun, responses = history(children[-1])
    if begun + len(responses) > ROWS // BATCH:
        return f"{root.name}: not a drill: the second kill came after the first epoch"
    children.append(fits.start(root))
    if children[-1].wait() != 0:
        return f"{root.name}: the resumed run failed: {children[-1].text[-500:]}"
    return unlike(fits.folder / "whole", whole, root, children)
