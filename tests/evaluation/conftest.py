"""Rows of our own for every task, and the command under fixed words."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_rows

PROBLEM = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)
IFEVAL = [
    (
        "Describe a harbour in at least 3 sentences.",
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "at least"},
    ),
    ("Write about bread without commas.", "punctuation:no_comma", {}),
    ("Name a river. All in capital letters.", "change_case:english_capital", {}),
    (
        "Write two words about a ferry, with less than 20 words.",
        "length_constraints:number_words",
        {"num_words": 20, "relation": "less than"},
    ),
]


def math_rows(count: int = 4) -> list[dict]:
    """Sums in the shape of DAPO-Math-17k."""
    return [
        {
            "data_source": "math_dapo",
            "prompt": [{"role": "user", "content": PROBLEM.format(f"What is {n} + {n}?")}],
            "ability": "MATH",
            "reward_model": {"ground_truth": str(2 * n), "style": "rule"},
            "extra_info": {"index": str(n)},
        }
        for n in range(count)
    ]


def ifeval_rows() -> list[dict]:
    """Instructions in the shape of google/IFEval; the last prompt holds two."""
    rows = [
        {"key": key, "prompt": prompt, "instruction_id_list": [instruction], "kwargs": [kwargs]}
        for key, (prompt, instruction, kwargs) in enumerate(IFEVAL)
    ]
    rows[-1]["instruction_id_list"].append("punctuation:no_comma")
    rows[-1]["kwargs"].append({})
    return rows


@pytest.fixture
def math_file(tmp_path) -> Path:
    """Four sums."""
    return write_rows(tmp_path / "math.jsonl", math_rows())


@pytest.fixture
def ifeval_file(tmp_path) -> Path:
    """Four prompts, five instructions."""
    return write_rows(tmp_path / "ifeval.jsonl", ifeval_rows())


def results(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """The metrics and the answers of a task in a folder of results."""
    summary = json.loads((folder / "results.json").read_text())
    rows = [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
    return summary["tasks"][task]["metrics"], rows
