"""How much of a divergence the likeliest tokens give, and what the measurements of recovery and drift take.

    python benchmarks/kept_tokens.py

For the quickstart's held-out questions and the packaged model in float32: KL(p(c) || p) over the k likeliest tokens and
the rest as one outcome, as a share of that over the whole vocabulary; and the seconds of `RecoveryAndDrift` at the
start (with the first pass over the context) and after a step.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

ROOT = Path(__file__).resolve().parent.parent
KEPT = (64, 256, 512, 1024, 2048, 4096)


def main() -> None:
    """Print both tables."""
    import torch
    from lightning import Trainer

    from opcd.callbacks import RecoveryAndDrift
    from opcd.data import ContextQueryDataModule
    from opcd.losses import ForwardKL, TopK
    from opcd.models import ModelConfig
    from opcd.modules import Distiller, Sampling, Student, TeacherRollout
    from opcd.modules.fixed_responses import likeliest
    from opcd.modules.lm.generation import generate
    from opcd.modules.lm.hidden_states import HiddenStates, head_of, last_hidden

    rows, text = (ROOT / "configs/data" / f"quickstart_{name}" for name in ("{}.jsonl", "context.txt"))
    data = ContextQueryDataModule(
        train=str(rows).format("train"), val=str(rows).format("val"), context=str(text), batch_size=8
    )
    data.setup("fit")
    batch, student = data.encode(data.examples("val")), Student.load(ModelConfig(dtype="float32"))
    model = student.model.eval()
    sampling = Sampling(24, temperature=0.0)
    responses = generate(model, batch.teacher_prompts, sampling, student.eos_ids, student.pad_id)
    with torch.no_grad():
        told, untold = (
            HiddenStates(last_hidden(model, prompts, responses), head_of(model))
            for prompts in (batch.teacher_prompts, batch.student_prompts)
        )
        of_student = untold.head(untold.hidden).log_softmax(-1)
        whole = ForwardKL().from_log_probs(of_student, told.head(told.hidden).log_softmax(-1)).mean()
        for k in KEPT:
            record = likeliest(told, k, student.vocabulary)
            part = TopK(ForwardKL(), k, support="teacher").values_of_record(of_student, *record.rows)["divergence"]
            print(f"{k} tokens: {float(part.mean() / whole):.3f} of {float(whole):.4f} nats a token", flush=True)

    class Timed(RecoveryAndDrift):
        """Prints how long it takes."""

        def on_train_start(self, *args: Any) -> None:
            """Time the start."""
            began = time.perf_counter()
            super().on_train_start(*args)
            print(f"start: {time.perf_counter() - began:.1f} s", flush=True)

        def on_train_end(self, *args: Any) -> None:
            """Time a later measurement."""
            began = time.perf_counter()
            super().on_train_end(*args)
            print(f"later: {time.perf_counter() - began:.1f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = Trainer(max_steps=1, limit_val_batches=0, default_root_dir=folder, callbacks=[Timed()], **quiet)
        trainer.fit(Distiller(ModelConfig(), rollout=TeacherRollout(Sampling(8))), datamodule=data)


if __name__ == "__main__":
    main()
