"""Seconds and GPU memory of a step with long responses over a long context, at the paper's sizes.

    python benchmarks/long_responses.py --responses 64 --response-tokens 4096 --context-tokens 8192
    python benchmarks/long_responses.py --attention eager --responses 16     # a mask of all pairs
    python benchmarks/long_responses.py --student tiny --teacher tiny --responses 4 --response-tokens 32 \\
        --context-tokens 256 --micro-batch-tokens 64                          # a trial on a CPU

The models have the shapes of Qwen3-1.7B and Qwen3-8B with random weights, and the responses are random tokens that are
not generated: the cost of a step depends on neither. The rest is a step of `opcd fit`: the teacher's packed pass after
the context, the student's pass with gradient checkpointing, the reverse KL over the whole vocabulary, AdamW.
`--attention` is the teacher's, whose rows are packed. Memory is the peak of the GPU's allocator.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch
from step import context_of, logged_steps
from transformers import Qwen3Config, Qwen3ForCausalLM

from opcd.data import Batch, ContextQueryDataModule
from opcd.losses import ReverseKL
from opcd.models import ModelConfig, load_tokenizer
from opcd.modules import Distiller, FrozenTeacher, Rollout, Student, Teacher, Trajectories

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16},
    "8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32},
}
PARTS = ("teacher", "student", "loss", "optimizer")


def config_of(shape: str, tokens: int) -> Qwen3Config:
    """The config of a Qwen3 of a shape of `SHAPES`."""
    small = shape == "tiny"
    return Qwen3Config(
        **SHAPES[shape],
        head_dim=32 if small else 128,
        num_key_value_heads=2 if small else 8,
        vocab_size=151936,
        tie_word_embeddings=shape != "8B",
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=2,
    )


class RandomTeacher(FrozenTeacher):
    """A frozen teacher with random weights, created on their device.

    Args:
        shape: one of `SHAPES`.
        tokens: the maximum number of positions.
        attention: transformers' name of the attention implementation.
    """

    def __init__(self, shape: str, tokens: int, attention: str) -> None:
        super().__init__()
        self.shape, self.tokens, self.attention = shape, tokens, attention

    def setup(self, student: Student, student_config: ModelConfig, device: torch.device) -> None:
        """Create the model."""
        config = config_of(self.shape, self.tokens)
        config._attn_implementation = self.attention
        with torch.device(device):
            self._model = Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16)


class RandomTokens(Rollout):
    """Random responses of one length, drawn from the first 40,000 tokens.

    Args:
        length: tokens of each response.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def max_response_tokens(self, data: ContextQueryDataModule, split: str) -> int:
        """The length of all responses."""
        return self.length

    def generate(self, student: Student, teacher: Teacher, batch: Batch) -> Trajectories:
        """Draw the responses."""
        responses = [torch.randint(10, 40000, (self.length,), device=p.device) for p in batch.student_prompts]
        return Trajectories.of(batch, responses, student.eos_ids)


def positions(options: argparse.Namespace) -> int:
    """The maximum number of positions of a row, with its question and the template's tokens."""
    return int(options.context_tokens + options.response_tokens) + 1024


def prepare(options: argparse.Namespace, folder: Path) -> tuple[ModelConfig, ContextQueryDataModule]:
    """Write the student's folder, rows and context. Returns the student's config and the data."""
    tokenizer = load_tokenizer(ModelConfig(options.tokenizer))
    config = config_of(options.student, positions(options))
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        Qwen3ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "student")
    tokenizer.save_pretrained(folder / "student")
    (folder / "context.txt").write_text(context_of(options.context_tokens, tokenizer))
    rows = [{"query": f"What follows from point {number}?"} for number in range(options.responses * options.steps)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ContextQueryDataModule(
        student=ModelConfig(str(folder / "student")),
        train=str(folder / "rows.jsonl"),
        context=str(folder / "context.txt"),
        batch_size=options.responses,
    )
    return ModelConfig(str(folder / "student")), data


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of the last step and its parts, and the memory peak of the run."""
    student, data = prepare(options, folder)
    distiller = Distiller(
        student,
        RandomTeacher(options.teacher, positions(options), options.attention),
        ReverseKL(),
        RandomTokens(options.response_tokens),
        gradient_checkpointing=True,
        shared_prefix="always",
        micro_batch_tokens=options.micro_batch_tokens,
    )
    last = logged_steps(distiller, data, folder, options.steps)[-1]
    seconds = {part: round(float(last[f"seconds/{part}"]), 2) for part in ("step", *PARTS)}
    return {"seconds": seconds, "peak_gib": round(float(last["memory/peak_mib"]) / 1024, 1)}


def main() -> None:
    """Measure one size and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="1.7B")
    parser.add_argument("--teacher", choices=SHAPES, default="8B")
    parser.add_argument("--tokenizer", default="smollm2-135m", help="the packaged model's, or a folder")
    parser.add_argument("--attention", choices=("sdpa", "flash_attention_2", "eager"), default="sdpa")
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--response-tokens", type=int, default=4096)
    parser.add_argument("--context-tokens", type=int, default=8192)
    parser.add_argument("--micro-batch-tokens", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=2, help="number of steps; the last one is printed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="opcd-long-") as folder:
        found = measure(options, Path(folder))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print("\n" + json.dumps(vars(options) | found | {"device": device, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
