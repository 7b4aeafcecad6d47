"""The share of right answers that `opcd predict` wrote, without and with the context.

    python benchmarks/answers.py runs/version_3/predictions.jsonl [more.jsonl ...]

An answer is right if the number after its last "Answer:" equals the reference. An answer without such a line is wrong.
Shares have Wilson's 95 % interval.
"""

import argparse
import json
import re
from pathlib import Path

from opcd.evaluation.intervals import wilson

ANSWER = re.compile(r"answer\s*:\**\s*(?P<text>[^\n]*)", re.IGNORECASE)
NUMBER = re.compile(r"-?\d[\d,]*\.?\d*")


def number(text: str) -> float | None:
    """The first number in a text, without thousands separators."""
    found = NUMBER.search(text)
    return float(found[0].replace(",", "")) if found else None


def right(answer: str, reference: str) -> bool:
    """Whether the number after the last "Answer:" equals the reference."""
    lines = ANSWER.findall(answer)
    return bool(lines) and number(lines[-1]) is not None and number(lines[-1]) == number(reference)


def main() -> None:
    """Print a Markdown table with a row for each file and prompt."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    print("| answers | prompt | n | right | % | 95 % interval | with an Answer line |\n|---|---|---|---|---|---|---|")
    for file in parser.parse_args().files:
        rows = [json.loads(line) for line in file.read_bytes().split(b"\n") if line]
        for name, prompt in (("answer", "without"), ("answer_with_context", "with the context")):
            chosen = [(row[name], row["reference"]) for row in rows if row[name] is not None]
            if not chosen:
                continue
            hits = sum(right(answer, reference) for answer, reference in chosen)
            formatted = sum(bool(ANSWER.search(answer)) for answer, _ in chosen)
            low, high = wilson(hits, len(chosen))
            share = f"{hits / len(chosen):.1%} | {low:.1%} to {high:.1%}"
            print(f"| {file} | {prompt} | {len(chosen)} | {hits} | {share} | {formatted} |")


if __name__ == "__main__":
    main()
