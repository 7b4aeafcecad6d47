"""Rows of our own for the evaluation tasks, and what an evaluation leaves."""

import json
from pathlib import Path

from tests.helpers.rows import read_rows

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


def results(folder: Path, task: str) -> tuple[dict, list[dict]]:
    """The metrics and the answers of a task in a folder of results."""
    summary = json.loads((folder / "results.json").read_text())
    return summary["tasks"][task]["metrics"], read_rows(folder / f"{task}.jsonl")


def scored_rows(*scores: list, name: str = "right") -> list[dict]:
    """The rows of answers with these scores, a list for each question."""
    return [
        {"index": index, "sample": sample, "query": f"q{index}", name: score}
        for index, part in enumerate(scores)
        for sample, score in enumerate(part)
    ]
