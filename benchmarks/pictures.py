"""The plots of README and docs/, as SVG files in docs/pictures/.

    opcd fit --config configs/quickstart.yaml --trainer.default_root_dir runs/pictures \
        --trainer.callbacks+=AnswerSamples --trainer.callbacks.every_n_steps 10
    python benchmarks/pictures.py runs/pictures/version_0
    python benchmarks/pictures.py --measured forgetting --runs NAME=RUN ...

quickstart.svg comes from that run, tokens.svg from the packaged model and the quickstart context, directions.svg from
the losses alone. forgetting_recovery.svg and forgetting_drift.svg have a line for each run, from its recovery.jsonl.
"""

import argparse
import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch
from torch import Tensor

from opcd.data import ContextQueryDataModule
from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL
from opcd.models import ModelConfig
from opcd.modules import Sampling
from opcd.modules.lm.generation import generate
from opcd.modules.student import Student
from opcd.results.plots import curves, drawn
from opcd.results.run_files import read_jsonl, read_metrics, right_over_steps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "pictures"
QUERY = "What is the cat that lives at the Brindlewick Observatory called?"


def main() -> None:
    """Draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", help="the quickstart, with sample answers every 10 steps")
    parser.add_argument(
        "--measured", metavar="NAME", help="draw recovery and drift of --runs, as NAME_recovery.svg ..."
    )
    parser.add_argument("--runs", nargs="+", default=[], metavar="NAME=RUN")
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    if options.measured:
        runs = {name: Path(run) for name, _, run in (word.partition("=") for word in options.runs)}
        for figure, unit in (("recovery", "share of the context's effect"), ("drift", "nats a token")):
            text = drawn(
                partial(measured, runs=runs, figure=figure), figure, "step", unit, f"{options.measured}-{figure}"
            )
            (OUT / f"{options.measured}_{figure}.svg").write_text(text + "\n", encoding="utf-8")
            print(OUT / f"{options.measured}_{figure}.svg")
        return
    run: Path = options.run
    pictures = {
        "quickstart": (
            partial(quickstart, run=run),
            "Six invented facts go into the weights: divergence, and held-out questions right",
            "step",
        ),
        "tokens": (tokens, f"{QUERY} The answer without the context, read with it", ""),
        "directions": (directions, "A student with one mode, a teacher with two", "token"),
    }
    for name, (draw, title, x) in pictures.items():
        (OUT / f"{name}.svg").write_text(drawn(draw, title, x, "", name) + "\n", encoding="utf-8")
        print(OUT / f"{name}.svg")


def quickstart(axes: "Axes", run: Path) -> None:
    """Plot the divergence of every step, and the share of held-out questions with a right answer."""
    axes.plot(*zip(*read_metrics(run)["train/divergence"], strict=True), color="tab:gray", label="nats a token")
    shares = axes.twinx()
    steps, right = zip(*right_over_steps(run), strict=True)
    shares.plot(steps, right, "o-", color="tab:blue", label="share right")
    shares.set_ylim(-0.03, 1.03)
    shares.grid(visible=False)


def measured(axes: "Axes", runs: dict[str, Path], figure: str) -> None:
    """Plot recovery or drift of each run over its steps, with a band for the 95 % interval."""
    groups, bounds = {}, {}
    for name, run in runs.items():
        rows = read_jsonl(run / "recovery.jsonl")
        ends = (figure, f"{figure}_low", f"{figure}_high")
        line, low, high = ([(row["step"], row[key]) for row in rows if row[key] is not None] for key in ends)
        groups[name], bounds[name] = [line], (low, high)
    curves(axes, groups, bounds)


def tokens(axes: "Axes") -> None:
    """Plot KL(p_S || p_T) at every token of the packaged model's answer to QUERY."""
    student = Student.load(ModelConfig(name="smollm2-135m"))
    folder = ROOT / "configs" / "data"
    data = ContextQueryDataModule(
        train=str(folder / "quickstart_val.jsonl"), context=str(folder / "quickstart_context.txt")
    )
    data.setup("fit")
    batch = data.encode([example for example in data.examples("train") if example.query == QUERY])
    sampling = Sampling(max_new_tokens=40, temperature=0.0)
    (answer,) = generate(student.model, batch.student_prompts, sampling, student.eos_ids, student.pad_id)
    with torch.no_grad():
        views = (logits(student.model, prompt, answer) for prompt in (*batch.student_prompts, *batch.teacher_prompts))
        nats = ReverseKL()(*views)
    words = [student.tokenizer.decode(token) for token in answer]
    axes.bar(range(len(words)), nats.tolist(), color="tab:blue")
    axes.set_xticks(range(len(words)), words, rotation=60, ha="right")
    axes.set_ylabel("KL(student ‖ teacher), nats")


def logits(model: Any, prompt: Tensor, answer: Tensor) -> Tensor:
    """The model's logits for every token of the answer, [R, V]."""
    output: Tensor = model(torch.cat([prompt, answer])[None]).logits
    return output[0, len(prompt) - 1 : -1]


def directions(axes: "Axes") -> None:
    """Plot the bell-shaped student that minimizes each divergence to a teacher with a large and a small mode."""
    places = torch.arange(60.0)
    teacher = (0.65 * bell(places, 15.0, 3.0) + 0.35 * bell(places, 42.0, 5.0)).log()
    axes.fill_between(places, teacher.exp(), color="tab:gray", alpha=0.35, label="teacher", linewidth=0)
    for name, divergence in {"ForwardKL": ForwardKL(), "JSD(0.5)": JSD(beta=0.5), "ReverseKL": ReverseKL()}.items():
        line = "--" if name == "ReverseKL" else "-"  # it may lie over another
        axes.plot(places, bell(places, *fitted(divergence, teacher, places)), line, label=name)
    axes.set_ylabel("probability")


def bell(places: Tensor, middle: Tensor | float, width: Tensor | float) -> Tensor:
    """A Gaussian over integers, [V], normalized to sum 1."""
    return torch.softmax(-(((places - middle) / width) ** 2) / 2, dim=0)


def fitted(divergence: Divergence, teacher: Tensor, places: Tensor) -> tuple[float, float]:
    """Mean and width of the bell with the least divergence, the best of nine starts."""
    bells = [_descended(divergence, teacher, places, middle, width) for middle in (10, 28, 45) for width in (3, 7, 15)]
    _, middle, width = min(bells)
    return middle, width


def _descended(
    divergence: Divergence, teacher: Tensor, places: Tensor, middle: float, width: float
) -> tuple[float, float, float]:
    bell = torch.tensor([middle, math.log(width)], requires_grad=True)
    optimizer = torch.optim.Adam([bell], lr=0.05)
    for _ in range(1000):
        loss = divergence(-(((places - bell[0]) / bell[1].exp()) ** 2) / 2, teacher)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), bell[0].item(), bell[1].exp().item()


if __name__ == "__main__":
    main()
