"""A system prompt and no questions: the share of its rules that a student keeps before, in the prompt and after.

    python -m benchmarks.from_prompt --student FOLDER [--asker FOLDER] [--teacher FOLDER] [--steps 20] [-- FIT OPTIONS]

The prompt is that of a fictional shop, with ten rules that code can check. `opcd queries` writes everyday messages to
it, the starter recipe for a manner (ReverseKL, the student's own answers) trains, and 40 messages by hand are answered.
Everything that is finished is kept in --out.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from benchmarks.from_context import TEXTS, read, run

RECIPE = Path(__file__).resolve().parent.parent / "opcd/cli/starter/manner/recipe.yaml"
MONEY = r"[$€£¥₹]|\b(dollars?|euros?|pounds?|cents?|yen|USD|EUR|GBP)\b"
RULES: dict[str, Callable[[str], bool]] = {
    "begins with Welcome": lambda a: re.match(r"Welcome\b", a) is not None,
    "says friend": lambda a: re.search(r"\bfriend\b", a, re.I) is not None,
    "at most 60 words": lambda a: 1 <= len(a.split()) <= 60,
    "no list, heading or bold": lambda a: re.search(r"^\s*([-*+•#]|\d+[.)]\s)|\*\*|__", a, re.M) is None,
    "one paragraph": lambda a: sum(bool(line.strip()) for line in a.splitlines()) <= 2,
    "no exclamation mark": lambda a: "!" not in a,
    "no other currency": lambda a: re.search(MONEY, a, re.I) is None,
    "the address once": lambda a: a.count("help@kettlewick.example") == 1,
    "no emoji": lambda a: re.search(r"[\u2600-\u27BF\U0001F000-\U0001FAFF]", a) is None,
    "the sign-off last": lambda a: a.splitlines()[-1:] == ["Warm cups, Kettlewick"],
}
"""What the prompt asks for -> whether an answer does it."""
TRUE_BEFORE = {"no list, heading or bold", "no exclamation mark", "no other currency", "no emoji"}
"""Rules that forbid something, which most answers keep without the prompt too."""


def kept(answers: list[str]) -> dict[str, float]:
    """Rule -> the share of answers that keep it."""
    return {name: fmean(rule(answer.strip()) for answer in answers) for name, rule in RULES.items()}


def trained(options: argparse.Namespace, others: list[str]) -> Path:
    """Write the questions and train, where that is not done. Returns the run's folder."""
    out, prompt = options.out.resolve(), str(TEXTS / "shop_prompt.txt")
    if not (out / "queries/report.json").is_file():
        words = ["queries", "--context", prompt, "--out", str(out / "queries"), "--kind", "manner", "--val", "0"]
        words += ["--count", str(options.count), "--model", options.asker or options.student]
        run([*words, *(["--student", options.student] if options.asker else [])])
    folder = out / f"fit-{options.steps}-{options.seed}"
    if not (folder / "seconds.json").is_file():
        words = ["fit", "--config", str(RECIPE), "--data.context", prompt, "--seed_everything", str(options.seed)]
        words += ["--data.train", str(out / "queries/train.jsonl"), "--data.val", str(TEXTS / "shop_questions.jsonl")]
        words += ["--model.student.name", options.student, "--trainer.max_steps", str(options.steps)]
        words += ["--model.rollout.init_args.sampling.max_new_tokens", "96"]
        words += ["--model.eval_sampling.max_new_tokens", "96", "--trainer.enable_checkpointing", "false"]
        words += ["--trainer.default_root_dir", str(folder), "--trainer.callbacks+", "AnswerSamples"]
        words += ["--trainer.callbacks.queries", "40"]
        words += ["--model.teacher.init_args.model.name", options.teacher] if options.teacher else []
        (folder / "seconds.json").write_text(json.dumps(run([*words, *others])))
    return folder / "version_0"


def main() -> None:
    """Train, and print the share of answers that keep each rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="smollm2-135m")
    parser.add_argument("--asker", help="writes the messages, which the student tries out; default: the student")
    parser.add_argument("--teacher", help="a larger teacher; default: the student itself, with the prompt")
    parser.add_argument("--count", type=int, default=48, help="messages to train on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/from_prompt"))
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, others = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
    version = trained(options, others)
    rows = read(version / "samples.jsonl")
    last = max(row["step"] for row in rows)
    shares = [
        kept([row["answer"] for row in rows if row["step"] == step and row["context"] is context])
        for step, context in ((0, False), (0, True), (last, False))
    ]
    print("| rule | before | in the prompt | after |\n|---|---|---|---|")
    for name in RULES:
        print(f"| {name} | {' | '.join(f'{share[name]:.0%}' for share in shares)} |")
    for title, names in (("all ten", list(RULES)), ("those that ask for something", [*RULES.keys() - TRUE_BEFORE])):
        print(f"| {title} | {' | '.join(f'{fmean(share[name] for name in names):.0%}' for share in shares)} |")
    measured = read(version / "recovery.jsonl")[-1]
    print(f"recovery {measured['recovery']:.3g}, drift {measured['drift']:.3g}, after {last} steps")


if __name__ == "__main__":
    main()
