"""Seconds and memory of a training step for contexts of several lengths, beside a peer.

    pip install -e '.[trl]'                   # the peer; not a dependency of opcd
    python benchmarks/step.py --peer trl --context-tokens 74 2000 8000
    python benchmarks/step.py --peer plain --context-tokens 74 --new-tokens 24 [--busy]
    python benchmarks/step.py --peer none --context-tokens 74 8000 --rounds 5
    python benchmarks/step.py --peer none --model SMALL --teacher LARGE --context-tokens 300 --new-tokens 160

Both sides train the same model on the same queries with the same context: AdamW, a frozen copy of the initial weights
as the teacher, the reverse KL over the whole vocabulary, and exactly --new-tokens sampled tokens per query. opcd
computes in the machine's fast type. Peers:

* trl: TRL's SDFTTrainer with bfloat16 autocast over float32 master weights;
* plain: the least that a step needs in plain transformers, in the same type as opcd: `generate`, one forward pass of
  the teacher, forward and backward of the student with a dense loss, logits of the responses only, no optimizer.

Every cell is a separate process, and the two sides take turns. With --busy, another process keeps one core busy. With
--rounds, all cells are measured several times in turns. Seconds are the median of the steps after --warm-up. Memory is
the peak of the process with model and libraries, or the peak of the allocator on a GPU. With several rounds, each
figure is the median over rounds, ratios included. "Over first" is opcd's step over its step with the first context.
"""

import argparse
import csv
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

WORDS = ("river", "stone", "lamp", "garden", "winter", "copper", "cloud", "market", "bridge", "forest", "paper")
PARTS = ("sync", "rollout", "teacher", "student", "loss", "optimizer")


def text(words: int, seed: int) -> str:
    """Random words."""
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def context_of(tokens: int, tokenizer: Any) -> str:
    """A text of about `tokens` tokens."""
    ids = tokenizer(text(2 * tokens, seed=0), add_special_tokens=False)["input_ids"][:tokens]
    return str(tokenizer.decode(ids))


def logged_steps(distiller: Any, data: Any, folder: Path, steps: int) -> list[dict[str, str]]:
    """Train `steps` steps. Returns the logged metrics of each."""
    from lightning import Trainer
    from lightning.pytorch.loggers import CSVLogger

    from opcd.accel.precision import trainer_precision

    trainer = Trainer(
        max_steps=steps,
        accelerator="auto",
        precision=trainer_precision(),
        log_every_n_steps=1,
        logger=CSVLogger(folder, name="", version=""),
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(distiller, datamodule=data)
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def opcd_side(options: argparse.Namespace) -> dict[str, Any]:
    """Measure opcd's Distiller."""
    from opcd.accel import accelerator

    accelerator("cpu")  # both sides keep freed blocks in the process
    from opcd.data import ContextQueryDataModule
    from opcd.losses import ReverseKL
    from opcd.models import ModelConfig, load_tokenizer
    from opcd.modules import Distiller, FrozenTeacher, Sampling, StudentRollout

    config = ModelConfig(options.model)
    folder = Path(tempfile.mkdtemp(prefix="opcd-step-"))
    rows = [{"query": text(12, seed=number)} for number in range(1, options.queries * (options.steps + 1))]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "context.txt").write_text(context_of(options.context, load_tokenizer(config)))
    sampling = Sampling(options.new_tokens, options={"min_new_tokens": options.new_tokens})
    teacher = FrozenTeacher(ModelConfig(options.teacher)) if options.teacher else FrozenTeacher()
    distiller = Distiller(
        config,
        teacher,
        ReverseKL(),
        StudentRollout(sampling),
        gradient_checkpointing=options.gradient_checkpointing is not None,
    )
    data = ContextQueryDataModule(
        train=str(folder / "rows.jsonl"), context=str(folder / "context.txt"), batch_size=options.queries
    )
    logged = logged_steps(distiller, data, folder, options.steps)[options.warm_up :]
    found = {part: statistics.median(float(r[f"seconds/{part}"]) for r in logged) for part in ("step", *PARTS)}
    return {"seconds": found.pop("step"), "parts": found}


def trl_side(options: argparse.Namespace) -> dict[str, Any]:
    """Measure TRL's SDFTTrainer."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    from opcd.models import ModelConfig, resolve

    folder = resolve(ModelConfig(options.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    context = context_of(options.context, tokenizer)
    rows = [
        {"prompt": [{"role": "user", "content": text(12, seed=number)}], "privileged_context": context}
        for number in range(1, options.queries * (options.steps + 1))
    ]
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    config = SDFTConfig(
        output_dir=tempfile.mkdtemp(prefix="trl-step-"),
        per_device_train_batch_size=options.queries,
        gradient_accumulation_steps=1,
        num_generations=1,
        max_steps=options.steps,
        max_prompt_length=None,
        max_completion_length=options.new_tokens,
        generation_kwargs={"min_new_tokens": options.new_tokens},
        temperature=1.0,
        teacher_model_kind="base",
        distillation_mode="full_logits",
        distillation_alpha=1.0,
        distillation_is_clip=None,
        learning_rate=5e-6,
        bf16=True,
        gradient_checkpointing=options.gradient_checkpointing == "both",
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    SDFTTrainer(
        model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[Clock()]
    ).train()
    return {"seconds": statistics.median(seconds[options.warm_up :])}


def plain_side(options: argparse.Namespace) -> dict[str, Any]:
    """Measure the parts of a step in plain transformers."""
    import torch

    from opcd.accel.precision import fast_dtype
    from opcd.models import ModelConfig, load_model, load_tokenizer

    fast, tokenizer = fast_dtype(), load_tokenizer(ModelConfig(options.model), "model")
    tokenizer.padding_side = "left"
    student = load_model(ModelConfig(options.model, dtype="float32")).train()
    teacher = load_model(ModelConfig(options.teacher or options.model))
    writer = student if fast == torch.float32 else load_model(ModelConfig(options.model))
    context, new = context_of(options.context, tokenizer), options.new_tokens
    spent: list[dict[str, float]] = []

    def prompts(first: int, system: list[dict[str, str]]) -> Any:
        chats = [[*system, {"role": "user", "content": text(12, seed=first + row)}] for row in range(options.queries)]
        return tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )

    def whole(prompt: Any, responses: Any) -> dict[str, Any]:
        mask = torch.cat([prompt["attention_mask"], torch.ones_like(responses)], 1)
        return {"input_ids": torch.cat([prompt["input_ids"], responses], 1), "attention_mask": mask}

    for step in range(options.steps):
        first = 1 + step * options.queries
        short, long = prompts(first, []), prompts(first, [{"role": "system", "content": context}])
        began = time.perf_counter()
        drawn = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new}
        written = writer.generate(**short, **drawn)[:, -new:]
        wrote = time.perf_counter()
        with torch.no_grad():
            target = teacher(**whole(long, written), logits_to_keep=new + 1).logits[:, :-1].float().log_softmax(-1)
        scored = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast == torch.bfloat16):
            logits = student(**whole(short, written), logits_to_keep=new + 1).logits[:, :-1]
        own = logits.float().log_softmax(-1)
        (own.exp() * (own - target)).sum(-1).mean().backward()
        learnt = time.perf_counter()
        student.zero_grad()
        spent.append({"rollout": wrote - began, "teacher": scored - wrote, "student": learnt - scored})
    parts = {part: statistics.median(of[part] for of in spent[options.warm_up :]) for part in spent[0]}
    return {"seconds": sum(parts.values()), "parts": parts}


def child(options: argparse.Namespace) -> None:
    """Measure one cell and print it as JSON."""
    found = {"opcd": opcd_side, "trl": trl_side, "plain": plain_side}[options.side](options)
    import torch

    from opcd.modules.step.metrics import peak_memory_mib

    found["peak_mib"] = peak_memory_mib(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    print("\n" + json.dumps(found))


@contextmanager
def busy() -> Iterator[None]:
    """A process that keeps one core busy."""
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        neighbour.kill()
        neighbour.wait()


def measure(options: argparse.Namespace, side: str, context: int) -> dict[str, Any]:
    """Run one cell in a separate process."""
    with busy() if options.busy else nullcontext():
        return measured_apart("-W", "ignore", *sys.argv, "--side", side, "--context", str(context))


def measured_apart(*words: str) -> dict[str, Any]:
    """Run Python with these words in a separate process. Returns the JSON object on the last line of its output."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Run every cell, and print the table or one JSON object per line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=("trl", "plain", "none"), default="trl")
    parser.add_argument("--context-tokens", type=int, nargs="+", default=[74, 2000, 8000])
    parser.add_argument("--model", default="smollm2-135m", help="the packaged model, a folder or a hub id")
    parser.add_argument("--teacher", help="another model as the teacher, for --peer none or plain")
    parser.add_argument("--queries", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--warm-up", type=int, default=2, help="number of first steps that are not counted")
    parser.add_argument("--rounds", type=int, default=1, help="how often every cell is measured")
    parser.add_argument(
        "--gradient-checkpointing",
        nargs="?",
        const="both",
        choices=("both", "opcd"),
        help="on both sides, or opcd's",
    )
    parser.add_argument("--busy", action="store_true", help="keep one core busy with another process")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        return child(options)
    if options.teacher and options.peer == "trl":
        parser.error("--teacher has no counterpart in the peer; add --peer none or plain")
    if not options.json:
        import torch
        import transformers

        print(f"{options.model}, {options.queries} x {options.new_tokens} tokens, {torch.get_num_threads()} threads,")
        print(f"torch {torch.__version__}, transformers {transformers.__version__}\n")
        print(f"| context | opcd s | {', '.join(PARTS)} | peer s | ratio | opcd MiB | peer MiB | ratio | over first |")
        print("|" + "---|" * 9)
    found: dict[int, list[Any]] = {context: [] for context in options.context_tokens}
    for number in range(1, options.rounds + 1):
        for context, cells in found.items():
            cells.append(cell(options, context))
            seconds, first = (of[-1]["opcd_step_s"] for of in (cells, found[options.context_tokens[0]]))
            cells[-1]["opcd_over_first"] = seconds / first
            print(f"round {number}, {context} tokens: {seconds:.2f} s, {seconds / first:.3f}", file=sys.stderr)
            if number == options.rounds:
                show(options, medians(cells) | {"context_tokens": context})
    return None


def cell(options: argparse.Namespace, context: int) -> dict[str, Any]:
    """Measure both sides with one context."""
    ours = measure(options, "opcd", context)
    peer = measure(options, options.peer, context) if options.peer != "none" else {}
    ratio, memory_ratio = (ours[key] / peer[key] if peer else None for key in ("seconds", "peak_mib"))
    line = {"context_tokens": context, "opcd_step_s": ours["seconds"], "parts": ours["parts"]}
    line |= {"peer_step_s": peer.get("seconds"), "ratio": ratio, "peer_parts": peer.get("parts")}
    return line | {
        "opcd_peak_mib": ours["peak_mib"],
        "peer_peak_mib": peer.get("peak_mib"),
        "memory_ratio": memory_ratio,
    }


def medians(found: list[Any]) -> Any:
    """The median of every figure of a cell over its rounds."""
    if isinstance(found[0], dict):
        return {key: medians([one[key] for one in found]) for key in found[0]}
    return found[0] if found[0] is None else statistics.median(found)


def show(options: argparse.Namespace, line: dict[str, Any]) -> None:
    """Print one context length."""
    if options.json:
        print(json.dumps(line), flush=True)
        return
    parts = ", ".join(f"{line['parts'][part]:.2f}" for part in PARTS)
    peer, memory = "| ", f"{line['opcd_peak_mib']:,.0f} | | "
    if line["ratio"] is not None:
        peer = f"{line['peer_step_s']:.2f} | {line['ratio']:.3f}"
        memory = f"{line['opcd_peak_mib']:,.0f} | {line['peer_peak_mib']:,.0f} | {line['memory_ratio']:.3f}"
    first = f"{line['opcd_over_first']:.3f}"
    print(
        f"| {line['context_tokens']} | {line['opcd_step_s']:.2f} | {parts} | {peer} | {memory} | {first} |", flush=True
    )


if __name__ == "__main__":
    main()
