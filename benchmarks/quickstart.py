"""The quickstart's recipe over seeds, precisions and contexts: right answers, recovery and drift.

    python benchmarks/quickstart.py --seeds 0 1 2 3 4                       # all contexts, in this machine's precision
    python benchmarks/quickstart.py --precisions bf16-mixed 32-true         # both precisions
    python benchmarks/quickstart.py --seeds 0 -- --trainer.max_steps 40     # options after -- go to `opcd fit`

Each cell is `opcd fit --config configs/quickstart.yaml` in a separate process. Per cell: right answers to six held-out
questions without the context, before and after; and two figures, from nats per token computed in float32:

* recovery = 1 - KL(p_T(c) || p_S) / KL(p_T(c) || p_base) on the base model's greedy responses to the held-out questions
  with the context: the share of the context's effect that is in the weights;
* drift = KL(p_base || p_S) on the base model's greedy responses to eight unrelated prompts.

A finished cell is not trained again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

ROOT = Path(__file__).resolve().parent.parent
CONTEXTS = {
    "observatory": ("configs/data/quickstart_{}.jsonl", "configs/data/quickstart_context.txt"),
    "bakery": ("tests/contexts/bakery_{}.jsonl", "tests/contexts/bakery.txt"),
    "ferry": ("tests/contexts/ferry_{}.jsonl", "tests/contexts/ferry.txt"),
}
GENERAL = (
    "Write a short poem about the sea.",
    "What is the capital of France?",
    "Explain why the sky is blue to a child.",
    "Give me three tips for better sleep.",
    "Translate 'good morning' into Spanish.",
    "How do I sort a list of numbers in Python?",
    "What happened in the story of Little Red Riding Hood?",
    "List five fruits that are red.",
)
"""Prompts that are unrelated to all contexts."""
GENERAL_TOKENS, ANSWER_TOKENS = 48, 32


def sources(context: str) -> tuple[Path, Path, Path]:
    """Training rows, held-out rows and the text."""
    rows, text = CONTEXTS[context]
    return ROOT / rows.format("train"), ROOT / rows.format("val"), ROOT / text


def fit(folder: Path, context: str, seed: int, precision: str | None, others: list[str]) -> None:
    """Train one cell unless it is finished."""
    if (folder / "version_0" / "student" / "model.safetensors").is_file():
        return
    train, val, text = sources(context)
    words = [sys.executable, "-m", "opcd", "fit", "--config", str(ROOT / "configs/quickstart.yaml")]
    words += ["--data.train", str(train), "--data.val", str(val), "--data.context", str(text)]
    words += ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    words += ["--trainer.enable_checkpointing", "false"]
    words += [*(["--trainer.precision", precision] if precision else []), *others]
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{folder} failed:\n{done.stderr[-3000:]}")
    (folder / "seconds.json").write_text(json.dumps(time.perf_counter() - began))


def counted(folder: Path) -> dict[str, Any]:
    """The right answers before and after, and the seconds, of a cell."""
    from opcd.results.run_files import read_jsonl, read_metrics
    from opcd.tasks.matching import right

    rows = read_jsonl(folder / "version_0/samples.jsonl")
    last = max(row["step"] for row in rows)
    steps = [seconds for _, seconds in read_metrics(folder / "version_0")["seconds/step"]]
    alone = [row for row in rows if not row["context"]]
    return {
        "before": sum(right(row) for row in alone if row["step"] == 0),
        "after": sum(right(row) for row in alone if row["step"] == last),
        "in the prompt": sum(right(row) for row in rows if row["context"]),
        "steps": last,
        "s a step": statistics.median(steps),
        "s in all": json.loads((folder / "seconds.json").read_text()),
    }


class Measure:
    """A measurement of the recovery and drift of students of the packaged model."""

    def __init__(self) -> None:
        from opcd.data import ContextQueryDataModule
        from opcd.models import ModelConfig, load_model, load_tokenizer
        from opcd.modules import Sampling, Student

        self.config = ModelConfig(dtype="float32")
        self.base = Student(load_model(self.config), load_tokenizer(self.config))
        self._make, self._sampling = ContextQueryDataModule, Sampling

    def __call__(self, student_folder: Path, context: str) -> dict[str, float]:
        """The figures of one student."""
        from opcd.models import ModelConfig, load_model

        student = load_model(ModelConfig(str(student_folder), dtype="float32"))
        batch, written = self._held_out(context)
        with_context = self._log_probs(self.base.model, batch.teacher_prompts, written)
        effect = _kl(with_context, self._log_probs(self.base.model, batch.student_prompts, written))
        left = _kl(with_context, self._log_probs(student, batch.student_prompts, written))
        general, answers = self._general()
        base = self._log_probs(self.base.model, general, answers)
        drift = _kl(base, self._log_probs(student, general, answers))
        return {"effect": effect, "recovery": 1 - left / effect, "drift": drift}

    def _held_out(self, context: str) -> tuple[Any, list[Any]]:
        train, val, text = sources(context)
        data = self._make(train=str(train), val=str(val), context=str(text))
        data.setup("fit")
        batch = data.encode(data.examples("val"))
        return batch, self._written(batch.teacher_prompts, ANSWER_TOKENS)

    def _general(self) -> tuple[list[Any], list[Any]]:
        import torch

        prompts = []
        for text in GENERAL:
            words = [{"role": "user", "content": text}]
            ids = self.base.tokenizer.apply_chat_template(words, add_generation_prompt=True, return_dict=False)
            prompts.append(torch.tensor(ids))
        return prompts, self._written(prompts, GENERAL_TOKENS)

    def _written(self, prompts: list[Any], tokens: int) -> list[Any]:
        from opcd.modules.lm.generation import generate

        greedy = self._sampling(tokens, temperature=0.0)
        return generate(self.base.model, prompts, greedy, self.base.eos_ids, self.base.pad_id)

    def _log_probs(self, model: Any, prompts: list[Any], responses: list[Any]) -> list[Any]:
        """Log-probabilities [R, V] of each response's positions."""
        import torch

        found = []
        with torch.no_grad():
            for prompt, response in zip(prompts, responses, strict=True):
                ids = torch.cat([prompt, response])[None, :-1]
                found.append(model(ids, logits_to_keep=len(response)).logits[0].float().log_softmax(-1))
        return found


def _kl(of: list[Any], to: list[Any]) -> float:
    """KL(of || to) in nats per token, over all tokens."""
    values = [(p.exp() * (p - q)).sum(-1) for p, q in zip(of, to, strict=True)]
    return float(sum(value.sum() for value in values) / sum(len(value) for value in values))


def main() -> None:
    """Train and measure every cell, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", default=list(CONTEXTS), choices=list(CONTEXTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--precisions", nargs="+", default=["auto"], choices=["auto", "32-true", "bf16-mixed"])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart_table"))
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, others = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    measure, columns = Measure(), ("before", "after", "in the prompt", "recovery", "drift", "s a step", "s in all")
    print(f"| context | precision | seed | {' | '.join(columns)} |\n|{'---|' * (3 + len(columns))}", flush=True)
    for precision in options.precisions:
        for context in options.contexts:
            for seed in options.seeds:
                folder = options.out.resolve() / f"{context}-{precision}-{seed}"
                fit(folder, context, seed, None if precision == "auto" else precision, others)
                found = counted(folder) | measure(folder / "version_0/student", context)
                (folder / "cell.json").write_text(json.dumps(found, indent=2))
                shown = [f"{found[name]:.3g}" for name in columns]
                print(f"| {context} | {precision} | {seed} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
