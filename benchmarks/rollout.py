"""Transformers' `generate` beside vLLM in one process: seconds to sync the weights and to generate a step's responses.

    .venv/vllm/bin/python benchmarks/rollout.py [--student NAME] [--rows 8 32] [--tokens 128] [--dtype bfloat16]

Every row is the mean of `--repeat` warm rollouts. The gap is the mean of |log p_S(y) - log p_B(y)| over the tokens,
with p_S in `--dtype`.
"""

import argparse
import statistics
import time

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch

from opcd.data import ContextQueryDataModule
from opcd.models import ModelConfig
from opcd.modules import ColocatedVLLM, FrozenTeacher, Sampling, StudentRollout, VLLMRollout
from opcd.modules.lm.hidden_states import HiddenStates, head_of, last_hidden
from opcd.modules.objective import rollout_log_ratios
from opcd.modules.rollouts.base import Rollout
from opcd.modules.student import Student
from opcd.modules.trajectories import Trajectories


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default=ModelConfig().name)
    parser.add_argument("--train", default="configs/data/quickstart_train.jsonl")
    parser.add_argument("--context", default="configs/data/quickstart_context.txt")
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--tokens", type=int, default=128, help="exact length of each response")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    config = ModelConfig(name=options.student)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = Student.load(config, device=device).to(device)
    data = ContextQueryDataModule(student=config, train=options.train, context=options.context, shuffle=False)
    data.setup("fit")
    examples = data.examples("train")
    options_of_all = {"sampling": Sampling(options.tokens, options={"min_new_tokens": options.tokens})}
    engine = ColocatedVLLM(max_model_len=1024, options={"enforce_eager": True, "seed": 0})
    rollouts: dict[str, Rollout] = {
        "transformers": StudentRollout(dtype=options.dtype, **options_of_all),
        "vLLM": VLLMRollout(engine, dtype=options.dtype, **options_of_all),
    }
    print("| responses | tokens each | rollout | take over, s | write, s | tokens/s | gap, nats |\n|" + "---|" * 7)
    for count in options.rows:
        batch = data.encode([examples[n % len(examples)] for n in range(count)]).to(device)
        for name, rollout in rollouts.items():
            print(f"| {count} | {options.tokens} | {name} | {measured(rollout, student, batch, options)} |", flush=True)


def measured(rollout: Rollout, student: Student, batch: object, options: argparse.Namespace) -> str:
    """The cells of one row."""
    seconds: dict[str, list[float]] = {"sync": [], "generate": []}
    for number in range(options.repeat + 1):  # the first one warms up
        torch.manual_seed(number)
        start = time.perf_counter()
        with rollout.active(student):
            middle = time.perf_counter()
            written = rollout.generate(student, FrozenTeacher(), batch)  # type: ignore[arg-type]
            end = time.perf_counter()
        if number:
            seconds["sync"].append(middle - start)
            seconds["generate"].append(end - middle)
    take, write = (statistics.mean(seconds[part]) for part in ("sync", "generate"))
    tokens = int(written.lengths.sum())
    return f"{take:.2f} | {write:.2f} | {tokens / write:.0f} | {gap(student, written, options)}"


@torch.no_grad()
def gap(student: Student, written: Trajectories, options: argparse.Namespace) -> str:
    """The mean gap over all tokens, if the rollout has log-probabilities."""
    model = student.plain(getattr(torch, options.dtype)).model.eval()
    states = HiddenStates(last_hidden(model, written.student_prompts, written.responses), head_of(model))
    if (found := rollout_log_ratios(states, written)) is None:
        return "0 (the same weights)"
    log_ratios, known = found
    return f"{float(log_ratios[known].abs().mean()):.4f}"


if __name__ == "__main__":
    main()
