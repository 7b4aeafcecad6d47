"""Time and memory of a divergence from hidden states and heads, forward and backward, beside the dense path.

    python benchmarks/losses.py
    python benchmarks/losses.py --vocabulary 49152 --widths 576 576 --dtype bfloat16 --rounds 5

Every cell runs in a separate process. Memory is the peak over all rounds, minus inputs and gradients (those of hidden
states and matrix; `.grad` is None before a round, as after an optimizer's `zero_grad`). Time is the median of the
rounds after the first. `dense` is plain PyTorch: both logits [N, V], log_softmax, the definition. `trl` is the
generalized JSD of TRL's GKD trainer on dense logits, and `liger` is the linear JSD of Liger-Kernel (compiled on a GPU
only), if they are installed. The last column divides by the figures of the dense path with the same divergence.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch
from step import measured_apart
from torch import Tensor
from torch.nn.functional import kl_div

from opcd.losses import JSD, Divergence, ForwardKL, ReverseKL, SkewReverseKL, TopK, chunked_divergence

LOSSES: dict[str, Divergence] = {
    "ReverseKL": ReverseKL(),
    "ForwardKL": ForwardKL(),
    "JSD": JSD(0.5),
    "SkewReverseKL": SkewReverseKL(0.1),
    "TopK(ReverseKL, 256, student)": TopK(ReverseKL(), 256, "student"),
    "TopK(ReverseKL, 256, teacher)": TopK(ReverseKL(), 256, "teacher"),
    "TopK(ReverseKL, 256, union)": TopK(ReverseKL(), 256, "union"),
}
DENSE = ("ReverseKL", "ForwardKL", "JSD")
PEERS = {"JSD": 0.5}
"""Divergences that TRL's generalized JSD and Liger's fused JSD compute too, with their beta."""


def dense(name: str, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """The definition over dense logits."""
    student, teacher = student_logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    if name == "ReverseKL":
        return kl_div(teacher, student, reduction="none", log_target=True).sum(-1)
    if name == "ForwardKL":
        return kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    half = torch.log(torch.tensor(0.5))
    mixture = torch.logsumexp(torch.stack([student + half, teacher + half]), dim=0)
    return sum(0.5 * kl_div(mixture, p, reduction="none", log_target=True).sum(-1) for p in (student, teacher))


def step(path: str, name: str) -> Callable[..., None]:
    """Forward and backward of one path, given hidden states and matrices."""

    def opcd_(hidden: Tensor, matrix: Tensor, teacher_hidden: Tensor, teacher_matrix: Tensor) -> None:
        chunked_divergence(LOSSES[name], hidden, matrix, teacher_hidden, teacher_matrix).mean().backward()

    def dense_(hidden: Tensor, matrix: Tensor, teacher_hidden: Tensor, teacher_matrix: Tensor) -> None:
        with torch.no_grad():
            teacher_logits = teacher_hidden @ teacher_matrix.T
        dense(name, hidden @ matrix.T, teacher_logits).mean().backward()

    def trl_(hidden: Tensor, matrix: Tensor, teacher_hidden: Tensor, teacher_matrix: Tensor) -> None:
        from trl.experimental.gkd import GKDTrainer

        with torch.no_grad():
            teacher_logits = teacher_hidden @ teacher_matrix.T
        GKDTrainer.generalized_jsd_loss(
            (hidden @ matrix.T)[None], teacher_logits[None], beta=PEERS[name], reduction="batchmean"
        ).backward()

    def liger_(hidden: Tensor, matrix: Tensor, teacher_hidden: Tensor, teacher_matrix: Tensor) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        fused = LigerFusedLinearJSDLoss(0.0, 1.0, PEERS[name], compiled=hidden.is_cuda)
        labels = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)  # used to count tokens
        hidden, matrix = hidden.to(teacher_hidden.dtype), matrix.to(teacher_matrix.dtype)  # it knows no autocast
        fused(hidden, matrix, teacher_hidden, teacher_matrix, labels).backward()

    return {"opcd": opcd_, "dense": dense_, "trl": trl_, "liger": liger_}[path]


def child(options: argparse.Namespace) -> None:
    """Measure one cell and print it as JSON."""
    torch.manual_seed(0)
    dtype, (width, teacher_width) = getattr(torch, options.dtype), options.widths

    def normal(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, device=options.device).mul_(scale)

    # The student's are float32 and trained under autocast, the teacher's have the short type: as in a run.
    hidden, teacher_hidden = normal(options.tokens, width, 1.0), normal(options.tokens, teacher_width, 1.0).to(dtype)
    matrix, teacher_matrix = (normal(options.vocabulary, w, 2 * w**-0.5) for w in options.widths)
    teacher_matrix = teacher_matrix.to(dtype)
    trained = (hidden.requires_grad_(), matrix.requires_grad_())
    one, seconds = step(options.path, options.loss), []

    def run(*tensors: Tensor) -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            one(*tensors)

    few = [x[:8].detach() for x in (hidden, matrix, teacher_hidden, teacher_matrix)]
    run(few[0].requires_grad_(), few[1].requires_grad_(), *few[2:])  # libraries load now
    before = reset_peak(options.device) + sum(tensor.nbytes for tensor in trained)
    for _ in range(options.rounds + 1):
        for tensor in trained:
            tensor.grad = None
        start = time.perf_counter()
        run(hidden, matrix, teacher_hidden, teacher_matrix)
        if options.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    mib = (peak(options.device) - before) / 2**20
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "mib": mib}))


def reset_peak(device: str) -> int:
    """Reset the peak of the memory. Returns the bytes in use."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return peak(device)


def peak(device: str) -> int:
    """The peak of the memory since `reset_peak`, in bytes; on a CPU, of the resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def installed(path: str) -> bool:
    """Whether the package of a path is installed."""
    import importlib.util

    package = {"trl": "trl", "liger": "liger_kernel"}.get(path)
    return package is None or importlib.util.find_spec(package) is not None


def main() -> None:
    """Run every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--widths", type=int, nargs=2, default=(896, 1536), help="of the student and of the teacher")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of teacher and autocast")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--path", help=argparse.SUPPRESS)
    parser.add_argument("--loss", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.path:
        return child(options)
    print(
        f"N = {options.tokens}, V = {options.vocabulary}, widths {options.widths[0]} and {options.widths[1]}, ", end=""
    )
    print(f"{options.dtype}, {options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| loss | path | seconds | MiB above inputs and gradients | of dense: time, memory |\n|---|---|---|---|---|")
    for loss in options.losses:
        base: dict[str, float] = {}
        for path in ("dense", "trl", "liger", "opcd"):
            known = {"dense": DENSE, "opcd": tuple(LOSSES)}.get(path, tuple(PEERS))
            if loss in known and installed(path):
                found = measured_apart(*sys.argv, "--path", path, "--loss", loss)
                base = base or found
                ratios = f"{found['seconds'] / base['seconds']:.2f}, {found['mib'] / base['mib']:.3f}"
                shown = ratios if path != "dense" and loss in DENSE else ""
                print(f"| {loss} | {path} | {found['seconds']:.2f} | {found['mib']:,.0f} | {shown} |", flush=True)
    return None


if __name__ == "__main__":
    main()
