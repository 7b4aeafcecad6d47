"""Seconds of log-probabilities from a vLLM server, with contexts computed and with contexts from its prefix cache.

    .venv/vllm/bin/python -m vllm.entrypoints.openai.api_server --model FOLDER --served-model-name teacher \\
        --max-logprobs 20 --enable-scale-out --enable-prompt-tokens-details
    python benchmarks/served.py [--base_url http://localhost:8000] [--rows 16] [--context 2000] [--tokens 64] [--k 20]

All rows share one random context, and each has a random query and response. The two ways take turns. "apart" is the
mean difference between the log-probabilities of the most likely tokens.
"""

import argparse
import random
import statistics
import time

import opcd  # noqa: F401  before torch: it sets how threads wait

# isort: split
import torch

from opcd.models import ModelConfig, load_tokenizer
from opcd.serving import ServedModel, Server
from opcd.serving.served_model import Row


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_url", default="http://localhost:8000")
    parser.add_argument("--name", default="teacher")
    parser.add_argument("--tokenizer", default=ModelConfig().name)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=2000, help="tokens")
    parser.add_argument("--query", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="of each response")
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    tokenizer = load_tokenizer(ModelConfig(name=options.tokenizer))
    model = ServedModel(Server(options.base_url, "OPCD_TEACHER_KEY", 8, 600.0, 0.0), options.name)
    model.connect(tokenizer, options.k)
    if not model.tells_cached:
        raise SystemExit("the server does not report cached tokens: start it with the options above")
    print("| contexts | seconds of each time |\n|---|---|")
    taken = [both_ways(model, drawn(options, len(tokenizer)), options.k) for _ in range(options.repeat)]
    for name, way in (("computed", 0), ("from the cache", 1)):
        print(f"| {name} | {', '.join(f'{seconds[way]:.1f}' for *seconds, _ in taken)} |")
    print(f"apart: {statistics.mean(apart for *_, apart in taken):.2g} nats")


def drawn(options: argparse.Namespace, vocabulary: int) -> list[Row]:
    """Rows with a new context: drawn without a seed, so that no server has it in its cache."""
    context, *own = (
        [random.randrange(vocabulary) for _ in range(count)]
        for count in (options.context, *[options.query + options.tokens] * options.rows)
    )
    return [(context + row[: options.query], row[options.query :]) for row in own]


def both_ways(model: ServedModel, rows: list[Row], k: int) -> tuple[float, float, float]:
    """Seconds with contexts computed, seconds with contexts from the cache, and the mean difference in nats."""
    seconds, likeliest = [], []
    # The cache first: after the other way, it would hold complete rows, without values of their tokens.
    for model.tells_cached in (True, False):
        start = time.perf_counter()
        values = model.log_probs(rows, k)
        seconds.append(time.perf_counter() - start)
        likeliest.append(torch.cat([log_probs[:, 0] for _, log_probs in values]))
    return seconds[1], seconds[0], float((likeliest[0] - likeliest[1]).abs().mean())


if __name__ == "__main__":
    main()
