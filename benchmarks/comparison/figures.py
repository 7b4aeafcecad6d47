"""The plots of a comparison, as SVG."""

from comparison.results import Outcome
from opcd.results.plots import bars, curves, drawn, points


def figures(outcome: Outcome) -> dict[str, str]:
    """Caption -> SVG. Plots without data are left out."""
    task, kept = outcome.measures.values()
    trained = [arm for arm in outcome.arms if arm.metrics]
    over_steps = {arm.name: [c for c in arm.curves if c] for arm in trained}
    over_steps = {name: members for name, members in over_steps.items() if members}
    divergence = {arm.name: [m.get("train/divergence", []) for m in arm.metrics] for arm in trained}
    both = {
        arm.name: [*zip(arm.scores["forgetting"].seeds, arm.scores["task"].seeds, strict=False)] for arm in outcome.arms
    }
    both = {name: members for name, members in both.items() if members}
    plots = {}
    if over_steps:
        plots["Accuracy over steps: the mean over seeds, and a band from the smallest to the largest seed."] = drawn(
            lambda axes: curves(axes, over_steps), f"{task.title} over steps", "step", "share right", "accuracy"
        )
    if both:
        plots["Accuracy and retained ability: up and to the right is better; small marks are seeds."] = drawn(
            lambda axes: points(axes, both), "accuracy against forgetting", kept.title, task.title, "forgetting"
        )
    if any(curve for members in divergence.values() for curve in members):
        plots["Each arm's own divergence, on its own responses: arms of different losses are not comparable."] = drawn(
            lambda axes: curves(axes, divergence), "divergence over steps", "step", "nats a token", "divergence"
        )
    if trained:
        cost = {arm.name: arm.step_seconds for arm in trained}
        plots["Cost of a training step; dots are seeds."] = drawn(
            lambda axes: bars(axes, cost), "cost", "seconds a step", "", "cost"
        )
    return plots
