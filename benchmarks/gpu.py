"""What the parts of a step cost on one GPU, at real shapes with random weights, and what the GPU could do at most.

    python benchmarks/gpu.py                                  # all sections
    python benchmarks/gpu.py loss teacher --json gpu.jsonl
    python benchmarks/gpu.py --device cpu --tiny              # how it runs, on a CPU: its figures say nothing

Sections: limits (products, copies, launches), correct (losses, gradients and the packed teacher beside float64 on the
CPU), rollout, teacher, loss, student, step. Every cell prints a JSON line. One that fails prints its error, and the
next one runs. The table at the end has the share of the products' limit: a loss and a student's pass count the products
that they cannot do without (no recomputation), a teacher those of its layers, and a rollout has none.
"""

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import long_responses
import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from opcd.losses import JSD, Divergence, ForwardKL, Head, ReverseKL, SkewReverseKL, TopK, chunked, chunked_divergence
from opcd.losses.chunking import rows_of
from opcd.modules.lm.generation import Sampling, generate
from opcd.modules.lm.hidden_states import last_hidden
from opcd.modules.objective import Objective
from opcd.modules.prefix.prefix_cache import PrefixCache

LOSSES: tuple[Divergence, ...] = (
    *(ReverseKL(), ForwardKL(), JSD(0.5), SkewReverseKL(0.1)),
    *(TopK(ReverseKL(), 16, support) for support in ("student", "teacher", "union")),
)
TOLERANCE = 1e-4
"""The largest difference from float64, relative to the largest number; the products are in float32, without TF32."""


class Cells:
    """Runs cells and keeps what they found.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.tiny = torch.device(options.device), options.tiny
        self.found: list[dict[str, Any]] = []
        self.limit: float | None = None

    @contextmanager
    def cell(self, section: str, name: str) -> Iterator[dict[str, Any]]:
        """Within, fill the findings of a cell; an error is one of them."""
        found: dict[str, Any] = {"section": section, "cell": name}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            yield found
            if self.device.type == "cuda":
                found["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        except Exception as error:
            found |= {
                "error": f"{type(error).__name__}: {str(error)[:300]}",
                "at": traceback.format_exc().splitlines()[-3],
            }
        if "tflops" in found and self.limit and section != "limits":
            found["share"] = round(found["tflops"] / self.limit, 3)
        self.found.append(found)
        print(json.dumps(found), flush=True)

    def seconds(self, run: Callable[[], object], repeat: int = 3) -> float:
        """The median of `repeat` runs after a first one."""
        taken = []
        for _ in range(repeat + 1):
            self.wait()
            start = time.perf_counter()
            run()
            self.wait()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken[1:])

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def autocast(self) -> Any:
        """A run's autocast."""
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def model(self, shape: str, dtype: torch.dtype, layers: int | None = None) -> PreTrainedModel:
        """A Qwen3 of a shape, on the device; a tiny one has 512 tokens."""
        config = long_responses.config_of("tiny" if self.tiny else shape, 65536)
        if self.tiny:
            config.vocab_size = 512
        elif layers:
            config = Qwen3Config(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
        with self.device:
            return Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()

    def tokens(self, *shape: int) -> Tensor:
        """Random tokens on the device."""
        return torch.randint(3, 500, shape, device=self.device)


def limits(cells: Cells) -> None:
    """The rate of bfloat16 products, of copies, and the time of a launch."""
    n = 256 if cells.tiny else 8192
    with cells.cell("limits", "products") as found:
        a, b = (torch.randn(n, n, device=cells.device, dtype=torch.bfloat16) for _ in range(2))
        found["tflops"] = cells.limit = 2 * n**3 / cells.seconds(lambda: a @ b, 10) / 1e12
    with cells.cell("limits", "copies") as found:
        source = torch.zeros(2**16 if cells.tiny else 2**30, device=cells.device)
        target = torch.empty_like(source)
        found["tb_per_s"] = 2 * source.nbytes / cells.seconds(lambda: target.copy_(source), 10) / 1e12
    with cells.cell("limits", "launches") as found:
        x = torch.zeros(8, device=cells.device)
        found["microseconds"] = cells.seconds(lambda: [x.add_(1) for _ in range(1000)]) * 1e3


def correct(cells: Cells) -> None:
    """Losses, gradients and the packed teacher on the device beside the CPU's float64."""
    n, v, h = (60, 300, 16) if cells.tiny else (700, 8192, 64)
    generator = torch.Generator().manual_seed(0)
    states, head = torch.randn(2, n, h, generator=generator), torch.randn(2, v, h, generator=generator) * 0.3
    for loss in LOSSES:
        with cells.cell("correct", repr(loss)) as found:
            results = []
            for device, dtype in (("cpu", torch.float64), (cells.device, torch.float32)):
                x, w, y, u = (t.to(device, dtype) for t in (states[0], head[0], states[1], head[1]))
                x.requires_grad_(), w.requires_grad_()
                value = chunked_divergence(loss, x, w, y, u)
                value.mean().backward()
                results.append([t.detach().double().cpu() for t in (value, x.grad, w.grad)])
            compare(found, *results)
    with cells.cell("correct", "packed teacher, float32") as found, torch.no_grad():
        packed(cells, found, torch.float32, TOLERANCE)
    with cells.cell("correct", "packed teacher, bfloat16") as found, torch.no_grad():
        packed(cells, found, torch.bfloat16, 0.05)  # of bfloat16 itself


def packed(cells: Cells, found: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    """Rows behind one prefix in one pass, beside whole rows in float64 on the CPU."""
    torch.manual_seed(0)
    config = long_responses.config_of("tiny", 4096)
    config.vocab_size = 512
    reference = Qwen3ForCausalLM._from_config(config, dtype=torch.float64).eval()
    prefix = torch.randint(3, 500, (200,))
    rows = [(torch.cat([prefix, torch.randint(3, 500, (9,))]), torch.randint(3, 500, (k,))) for k in (60, 90, 40)]
    right = torch.cat([last_hidden(reference, [p], [r]) for p, r in rows])
    model = Qwen3ForCausalLM._from_config(config, dtype=dtype).eval()
    model.load_state_dict(reference.state_dict())
    model.to(cells.device)
    there = [(p.to(cells.device), r.to(cells.device)) for p, r in rows]
    scored = PrefixCache("always").score(model, [prefix.to(cells.device)] * len(rows), there, 4096)
    result = torch.cat([scored[row] for row in range(len(rows))]).double().cpu()
    compare(found, [right], [result], tolerance)


def compare(found: dict[str, Any], right: list[Tensor], others: list[Tensor], tolerance: float = TOLERANCE) -> None:
    """Note the largest relative differences, and raise ``ValueError`` beyond the tolerance."""
    pairs = zip(right, others, strict=True)
    found["differences"] = [float((a - b).abs().max() / a.abs().max()) for a, b in pairs]
    if not max(found["differences"]) < tolerance:  # NaN too
        raise ValueError(f"more than {tolerance:g} from float64: {found['differences']}")


def rollout(cells: Cells) -> None:
    """Tokens a second of the rollout in this process."""
    model = cells.model("1.7B", torch.bfloat16)
    for rows, prompt, new in [(2, 8, 6)] if cells.tiny else [(16, 512, 512), (128, 512, 512), (32, 4096, 256)]:
        with cells.cell("rollout", f"{rows} rows, {prompt} + {new} tokens") as found:
            prompts = list(cells.tokens(rows, prompt))

            def run(limit: int, prompts: list[Tensor] = prompts) -> float:
                cells.wait()
                start = time.perf_counter()
                generate(model, prompts, Sampling(limit, options={"min_new_tokens": limit}), {2}, 2)
                cells.wait()
                return time.perf_counter() - start

            run(2)
            half, whole = run(new // 2), run(new)  # the prompts' own pass cancels
            found["tokens_per_s"] = round(rows * (new - new // 2) / max(whole - half, 1e-9))
            found["ms_a_token"] = round(1e3 * (whole - half) / (new - new // 2), 2)


def teacher(cells: Cells) -> None:
    """The teacher behind a context: whole rows, and rows packed behind its keys and values."""
    layers = 12
    model = cells.model("8B", torch.bfloat16, layers)
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    sizes = [(40, 2, 6)] if cells.tiny else [(2048, 8, 1024), (8192, 8, 1024), (8192, 8, 4096), (32768, 8, 1024)]
    for context, rows, response in sizes:
        prefix = cells.tokens(context)
        pairs = [(torch.cat([prefix, cells.tokens(32)]), cells.tokens(response)) for _ in range(rows)]
        cache = PrefixCache("always", 16384)
        ways: dict[str, tuple[int, Callable[[], object]]] = {
            "whole rows": (context, lambda pairs=pairs: [last_hidden(model, [p], [r]) for p, r in pairs]),
            "packed": (0, lambda p=prefix, x=pairs, c=cache: c.score(model, [p] * len(x), x, 2**20)),
        }
        for way, (again, run) in ways.items():
            name = f"{way}: {rows} x {response} behind {context}, {model.config.num_hidden_layers} layers"
            with cells.cell("teacher", name) as found, torch.no_grad():
                found["seconds"] = cells.seconds(run)
                found["tflops"] = 2 * weights * rows * (again + 32 + response) / found["seconds"] / 1e12


def loss(cells: Cells) -> None:
    """The loss and its statistics, forward and backward, of 1.7B's student under 8B's teacher; Liger's if installed."""
    v, hs, ht = (1024, 32, 64) if cells.tiny else (151936, 2048, 4096)
    student = torch.nn.Parameter(torch.randn(v, hs, device=cells.device) * hs**-0.5)  # float32 master weights
    other = torch.randn(v, ht, device=cells.device, dtype=torch.bfloat16) * ht**-0.5
    for n in (64,) if cells.tiny else (16384, 131072):
        hidden = torch.randn(n, hs, device=cells.device, requires_grad=True)
        theirs = torch.randn(n, ht, device=cells.device, dtype=torch.bfloat16)
        work, tokens = 2 * n * v * (3 * hs + ht), torch.randint(0, v, (n,), device=cells.device)
        weights = torch.full((n,), 1 / n, device=cells.device)

        def ours(
            kind: Divergence, x: Tensor = hidden, y: Tensor = theirs, tokens: Tensor = tokens, w: Tensor = weights
        ) -> None:
            x.grad = student.grad = None
            terms = Objective(kind, 0.6, None)._terms
            values = chunked(
                lambda *chunk: tuple(terms(*chunk).values()), x, Head(student), y, Head(other), (tokens,),
                weights=w, temperature=0.6,
            )  # fmt: skip
            (values[0] * w).sum().backward()

        for kind in (ReverseKL(), JSD(0.5), TopK(ReverseKL(), 256, "student")):
            name = f"opcd {kind!r}, {n} tokens, chunks of {rows_of(cells.device, v)}"
            with cells.cell("loss", name) as found, cells.autocast():
                found["seconds"] = cells.seconds(lambda kind=kind, ours=ours: ours(kind))  # type: ignore[misc]
                found["tflops"] = work / found["seconds"] / 1e12
        if n < 20000:
            with cells.cell("loss", f"Liger JSD, {n} tokens") as found:
                found["seconds"] = cells.seconds(liger(hidden, student, theirs, other))
                found["tflops"] = work / found["seconds"] / 1e12


def liger(hidden: Tensor, matrix: Tensor, theirs: Tensor, other: Tensor) -> Callable[[], None]:
    """Liger's linear JSD, forward and backward."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    fused = LigerFusedLinearJSDLoss(0.0, 1.0, 0.5, compiled=hidden.is_cuda)
    x, w = (t.detach().bfloat16().requires_grad_() for t in (hidden, matrix))
    labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return lambda: fused(x, w, theirs, other, labels).backward()


def student(cells: Cells) -> None:
    """The student's forward and backward pass with gradient checkpointing; its useful operations."""
    model = cells.model("1.7B", torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    weights = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name)
    config = model.config
    for rows, length in [(2, 16)] if cells.tiny else [(16, 1024), (2, 16384)]:
        with cells.cell("student", f"{rows} x {length} tokens") as found, cells.autocast():
            prompts, responses = list(cells.tokens(rows, 16)), list(cells.tokens(rows, length))

            def run(prompts: list[Tensor] = prompts, responses: list[Tensor] = responses) -> None:
                model.zero_grad()
                last_hidden(model, prompts, responses).float().pow(2).mean().backward()

            found["seconds"] = cells.seconds(run)
            attention = 2 * length * config.num_attention_heads * config.head_dim * config.num_hidden_layers
            found["tflops"] = 3 * rows * length * (2 * weights + attention) / found["seconds"] / 1e12


def step(cells: Cells) -> None:
    """A full step by its parts, but for the rollout: 1.7B under 8B, or two tiny models."""
    sizes = [(2, 6, 40, 64)] if cells.tiny else [(16, 2048, 4096, 16384), (16, 4096, 8192, 32768)]
    shape = {"student": "tiny", "teacher": "tiny"} if cells.tiny else {"student": "1.7B", "teacher": "8B"}
    for responses, response, context, most in sizes:
        with cells.cell("step", f"{responses} x {response} behind {context}") as found:
            options = argparse.Namespace(
                **shape, tokenizer="smollm2-135m", attention="sdpa", responses=responses, response_tokens=response,
                context_tokens=context, micro_batch_tokens=most, steps=2,
            )  # fmt: skip
            with tempfile.TemporaryDirectory(prefix="opcd-gpu-") as folder:
                found |= long_responses.measure(options, Path(folder))


SECTIONS = {section.__name__: section for section in (limits, correct, rollout, teacher, loss, student, step)}
UNITS = {"tflops": "TFLOP/s", "tb_per_s": "TB/s", "microseconds": "µs", "tokens_per_s": "tokens/s", "seconds": "s"}


def table(found: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table of all cells."""
    lines = ["| section | cell | found | of the products' limit |", "|---|---|---|---|"]
    for cell in found:
        shown = [f"{cell[key]:.4g} {unit}" for key, unit in UNITS.items() if isinstance(cell.get(key), float | int)]
        if isinstance(cell.get("seconds"), dict):
            shown = [f"{part} {seconds:g} s" for part, seconds in cell["seconds"].items()]
        if "differences" in cell:
            shown = [f"{max(cell['differences']):.1e} from float64"]
        shown = [cell["error"].replace("|", "/")] if "error" in cell else shown
        share = f"{cell['share']:.1%}" if "share" in cell else ""
        lines.append(f"| {cell['section']} | {cell['cell']} | {', '.join(shown)} | {share} |")
    return lines


def main() -> int:
    """Run the sections. Returns 1 where a result differs from float64, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs")
    parser.add_argument("--json", type=Path, help="append the lines to this file")
    options = parser.parse_args()
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU is here; try it with --device cpu --tiny")
    cells = Cells(options)
    chosen = options.sections or list(SECTIONS)
    for name in dict.fromkeys(["limits", *chosen]):  # the limit is what the others are compared with
        with nullcontext() if name == "correct" else torch.random.fork_rng([]):
            try:
                SECTIONS[name](cells)
            except Exception as error:  # outside of a cell: a model that does not fit
                with cells.cell(name, "whole section"):
                    raise error
    machine = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"\n{machine}, torch {torch.__version__}\n\n" + "\n".join(table(cells.found)))
    if options.json:
        lines = [json.dumps({"machine": machine, "torch": torch.__version__} | found) + "\n" for found in cells.found]
        with options.json.open("a") as file:
            file.writelines(lines)
    return int(any(cell["section"] == "correct" and "error" in cell for cell in cells.found))


if __name__ == "__main__":
    raise SystemExit(main())
