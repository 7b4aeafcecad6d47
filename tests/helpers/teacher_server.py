"""A real model behind HTTP in vLLM's shapes, and whatever a server may do wrong."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

BLOCK = 4
"""Tokens of a block of the prefix cache."""


class Served:
    """A model of a Hugging Face folder, and its log-probabilities as vLLM 0.32 tells them.

    Attributes:
        name: the model's, in requests.
        root: where it is from.
    """

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.name, self.root = "teacher", folder

    @torch.no_grad()
    def completion(self, prompt: list[int], k: int) -> dict[str, Any]:
        """A table for every token of the prompt but the first."""
        log_probs = self.model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        tables = [self._table(*pair, k) for pair in zip(log_probs[:-1], prompt[1:], strict=True)]
        choice = {"index": 0, "text": self.tokenizer.decode(log_probs[-1].argmax()), "finish_reason": "length"}
        return {
            "id": "cmpl-1",
            "object": "text_completion",
            "created": int(time.time()),
            "model": self.name,
            "choices": [{**choice, "logprobs": None, "stop_reason": None, "prompt_logprobs": [None, *tables]}],
            "usage": {"prompt_tokens": len(prompt), "total_tokens": len(prompt) + 1, "completion_tokens": 1},
        }

    def _table(self, log_p: torch.Tensor, token: int, k: int) -> dict[str, Any]:
        """The token that is there first, then the k likeliest: k or k + 1 entries."""
        best = log_p.topk(k)
        ranked = [(token, log_p[token], int((log_p >= log_p[token]).sum()))]
        ranked += zip(best.indices.tolist(), best.values, range(1, k + 1), strict=True)
        return {
            str(i): {"logprob": float(value), "rank": rank, "decoded_token": self.tokenizer.decode([i])}
            for i, value, rank in ranked
        }


class TeacherServer(ThreadingHTTPServer):
    """Answers for a model on a free port of this machine, as `vllm serve` does.

    Attributes:
        cache: whether prompts come from a prefix cache, and what the answer has in place of tables of what did: "left
            out" (vLLM's newer engine) or "filled" with what lies around (the other). None: the route is closed.
        cached: tokens of each answer that came from it.
        fault: gets a handler, its path and the answer that is due; returns the answer to give, or None where it has
            answered in its own way.
        until: how many requests of a path the fault meets; the first ones. None: all.
        key: wanted of every request.
        seen: path, body and headers of each request.
        most: requests that were in work at the same time.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, served: Served) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.served, self.max_logprobs, self.window = served, 20, 512
        self.key: str | None = None
        self.fault: Callable[[Any, str, Any], Any] | None = None
        self.until: int | None = None
        self.seen: list[tuple[str, Any, dict[str, str]]] = []
        self.cache: str | None = None
        self.cached: list[int] = []
        self.known: set[tuple[int, ...]] = set()
        self.busy, self.most, self.lock = 0, 0, threading.Lock()

    @property
    def url(self) -> str:
        """Its base_url."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a request."""
        served = self.served
        if path == "/v1/models":
            card = {"id": served.name, "object": "model", "owned_by": "vllm", "root": served.root, "parent": None}
            return 200, {"object": "list", "data": [{**card, "max_model_len": self.window}]}
        if path in ("/tokenize", "/v1/completions") and body["model"] != served.name:
            return 404, _error(f"The model `{body['model']}` does not exist.")
        if path == "/tokenize":
            ids = served.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"count": len(ids), "max_model_len": self.window, "tokens": ids, "token_strs": None}
        if path == "/v1/completions":
            return self._completion(body["prompt"], body["prompt_logprobs"], body["max_tokens"])
        if path == "/inference/v1/generate" and self.cache is None:
            return 403, _error("Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out.")
        if path == "/inference/v1/generate":
            assert body["sampling_params"]["skip_reading_prefix_cache"] is False
            return self._rest(body["token_ids"], body["sampling_params"])
        return 404, {"detail": "Not Found"}

    def _rest(self, prompt: list[int], sampling: dict[str, Any]) -> tuple[int, Any]:
        status, answer = self._completion(prompt, sampling["prompt_logprobs"], sampling["max_tokens"])
        if status != 200:
            return status, answer
        with self.lock:
            starts = [tuple(prompt[:end]) for end in range(BLOCK, len(prompt), BLOCK)]  # the last token is computed
            cached = BLOCK * sum(start in self.known for start in starts)
            self.known.update(starts)
            self.cached.append(cached)
        tables = answer["choices"][0].pop("prompt_logprobs")
        junk = {"-86956944": {"logprob": 1.8e28, "rank": -86957088, "decoded_token": None}}
        filled = [junk] * cached if self.cache == "filled" else []
        usage = answer["usage"] | {"prompt_tokens_details": {"cached_tokens": cached}}
        return 200, answer | {"usage": usage, "prompt_logprobs": [None, *filled, *tables[cached + 1 :]]}

    def _completion(self, prompt: list[int], k: int, new: int) -> tuple[int, Any]:
        if k > self.max_logprobs:
            said = f"Requested prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}"
            return 400, _error(said)
        if len(prompt) + new > self.window:
            return 400, _error(f"Input length ({len(prompt)}) exceeds model's maximum context length ({self.window}).")
        return 200, self.served.completion(prompt, k)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone away is no news."""


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: TeacherServer

    def do_GET(self) -> None:
        """A question."""
        self._serve(None)

    def do_POST(self) -> None:
        """A question with a body."""
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body: Any) -> None:
        server = self.server
        with server.lock:
            before = sum(path == self.path for path, *_ in server.seen)
            server.seen.append((self.path, body, dict(self.headers)))
            server.busy += 1
            server.most = max(server.most, server.busy)
        try:
            if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
                self.say(401, _error("Unauthorized"))
                return
            status, answer = server.answer(self.path, body)
            if server.fault and (server.until is None or before < server.until):
                answer = server.fault(self, self.path, answer)
            if answer is not None:
                self.say(status, answer)
        finally:
            with server.lock:
                server.busy -= 1

    def say(self, status: int, answer: Any, **headers: str) -> None:
        """Answer with JSON."""
        self.send(status, json.dumps(answer).encode(), **headers)

    def send(self, status: int, data: bytes, length: int | None = None, **headers: str) -> None:
        """Answer with bytes, and perhaps a length that is not theirs."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is printed."""


@contextmanager
def serving(served: Served) -> Iterator[TeacherServer]:
    """A server that runs as long as the block."""
    server = TeacherServer(served)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}}
