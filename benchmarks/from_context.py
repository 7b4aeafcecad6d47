"""Questions that a model wrote beside questions written by hand: what a student knows after training on either.

    python benchmarks/from_context.py --asker FOLDER_OR_NAME                    # three documents
    python benchmarks/from_context.py --documents hiking_club --steps 60 --arms by_hand
    python benchmarks/from_context.py --arms by_itself -- --model.optimizer.init_args.lr 1e-4    # after --: `opcd fit`

The documents are fictional, of two pages, each with 30 questions by hand that no arm trains on. Arms:

    by_hand      questions that were written by hand: 120 for hiking_club, each about one fact; 40 for the others
    by_asker     as many that `opcd queries` wrote with the model --asker, tried out by the student
    by_itself    as many that the student itself wrote

All arms see the same chunks of the document as context: the student is small, and answers better under half a page than
under two. An answer is right if it holds one of the question's `answers`. Everything that is finished is kept in --out.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import opcd  # noqa: F401  before torch: it sets how threads wait

ROOT = Path(__file__).resolve().parent.parent
TEXTS = ROOT / "benchmarks/data/from_context"
DOCUMENTS = ("hiking_club", "fog_collector", "repair_workshop")
ARMS = ("by_hand", "by_asker", "by_itself")
COLUMNS = ("before", "after", "chunk in the prompt", "recovery", "drift", "s to ask", "s to train")


def read(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows, and give the file's path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def run(words: list[str]) -> float:
    """Run a command of opcd. Returns its seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "opcd", *words], capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"opcd {' '.join(words)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - began


class Document:
    """A document with its chunks and its questions.

    Args:
        name: of its files.
        chunk_tokens: most tokens of a chunk.
        student: whose tokenizer counts them.
    """

    def __init__(self, name: str, chunk_tokens: int, student: str) -> None:
        from opcd.models import ModelConfig, load_tokenizer
        from opcd.queries.documents import read_documents
        from opcd.queries.parts import chunks

        tokenizer = load_tokenizer(ModelConfig(student))
        self.file, self.chunk_tokens = TEXTS / f"{name}.md", chunk_tokens
        cut = chunks(read_documents([str(self.file)]), chunk_tokens, lambda text: len(tokenizer(text)["input_ids"]))
        self.chunks = [chunk.text for chunk in cut]
        self.questions = read(TEXTS / f"{name}_questions.jsonl")
        self.by_hand = read(TEXTS / f"{name}_handwritten.jsonl")

    def chunk_of(self, query: str, answers: list[str]) -> str:
        """The chunk that holds an answer, and has most words in common with the question."""
        from opcd.queries.filters import COMMON, words
        from opcd.tasks.matching import holds

        holding = [chunk for chunk in self.chunks if any(holds(chunk, answer) for answer in answers)]
        asked = words(query) - COMMON
        return max(holding, key=lambda chunk: len(asked & words(chunk)))

    def section(self, title: str) -> str:
        """The chunk that a section of the document was put into first."""
        return next(chunk for chunk in self.chunks if f"## {title}\n" in chunk)

    def val(self, file: Path) -> Path:
        """Write the questions that are held out."""
        rows = [
            {
                "query": row["query"],
                "reference": row["answers"][0],
                "context": self.chunk_of(row["query"], row["answers"]),
            }
            for row in self.questions
        ]
        return write(file, rows)

    def train(self, arm: str, folder: Path, options: argparse.Namespace) -> tuple[Path, float]:
        """The training questions of an arm, and the seconds that it took to write them."""
        if arm == "by_hand":
            rows = [{"query": row["query"], "context": self.section(row["section"])} for row in self.by_hand]
            return write(folder / "train.jsonl", rows), 0.0
        words = ["queries", "--context", str(self.file), "--out", str(folder), "--kind", "facts", "--val", "0"]
        words += ["--count", str(len(self.by_hand)), "--chunk_tokens", str(self.chunk_tokens)]
        words += ["--model", options.asker] if arm == "by_asker" else ["--model", options.student]
        words += ["--student", options.student] if arm == "by_asker" else []
        if not (folder / "report.json").is_file():
            run(words)
        return folder / "train.jsonl", json.loads((folder / "report.json").read_text())["seconds"]


def trained(folder: Path, train: Path, val: Path, options: argparse.Namespace, others: list[str]) -> Path:
    """Train a student, unless it is trained. Returns the run's folder."""
    version = folder / "version_0"
    if not (folder / "seconds.json").is_file():
        words = ["fit", "--config", str(ROOT / "configs/quickstart.yaml"), "--data.context", "null"]
        words += ["--data.train", str(train), "--data.val", str(val), "--model.student.name", options.student]
        words += ["--trainer.max_steps", str(options.steps), "--trainer.default_root_dir", str(folder)]
        words += ["--model.lr_scheduler.init_args.total_iters", str(options.steps)]
        words += ["--seed_everything", str(options.seed), "--trainer.enable_checkpointing", "false"]
        words += ["--trainer.callbacks+", "AnswerSamples", "--trainer.callbacks.queries", "30"]
        seconds = run([*words, *others])
        (folder / "seconds.json").write_text(json.dumps(seconds))
    return version


def counted(version: Path, questions: list[dict[str, Any]]) -> dict[str, Any]:
    """Right answers before, after and with the context, and recovery and drift at the end."""
    from opcd.tasks.matching import holds

    rows = read(version / "samples.jsonl")
    answers = {row["query"]: row["answers"] for row in questions}
    last = max(row["step"] for row in rows)

    def right(step: int, context: bool) -> int:
        chosen = [row for row in rows if row["step"] == step and row["context"] is context]
        return sum(any(holds(row["answer"], answer) for answer in answers[row["query"]]) for row in chosen)

    measured = read(version / "recovery.jsonl")[-1]
    return {
        "before": right(0, False),
        "after": right(last, False),
        "chunk in the prompt": right(0, True),
        "recovery": measured["recovery"],
        "drift": measured["drift"],
        "s to train": json.loads((version.parent / "seconds.json").read_text()),
    }


def cells(options: argparse.Namespace, others: list[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Document, arm and figures of each cell, trained where it is not."""
    for name in options.documents:
        document = Document(name, options.chunk_tokens, options.student)
        folder = options.out.resolve() / name
        val = document.val(folder / "val.jsonl")
        for arm in options.arms:
            train, asking = document.train(arm, folder / arm, options)
            version = trained(folder / f"{arm}-{options.steps}-{options.seed}", train, val, options, others)
            yield name, arm, {**counted(version, document.questions), "s to ask": asking}


def main() -> None:
    """Train and measure every cell, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", nargs="+", default=list(DOCUMENTS), choices=DOCUMENTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--asker", help="the model of by_asker: a name, folder or hub id")
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chunk_tokens", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/from_context"))
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, others = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    if "by_asker" in options.arms and options.asker is None:
        parser.error("by_asker wants --asker, the model that writes the questions")
    print(f"| document | arm | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}", flush=True)
    for name, arm, found in cells(options, others):
        shown = [f"{found[column]:.3g}" for column in COLUMNS]
        print(f"| {name} | {arm} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
