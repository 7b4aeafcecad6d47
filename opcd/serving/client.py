"""A concurrent client for JSON over HTTP, with timeouts and retries.

An attempt has `timeout` seconds. After a failure that may pass (no connection, no answer in time, 429, 5xx, truncated
JSON), another attempt follows, after a pause that doubles or that the server asks for (Retry-After). `ServerError` is
raised where that attempt would begin later than `patience` seconds after the first, and for every other failure.
"""

import asyncio
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar

import httpx2
from lightning.pytorch.utilities import rank_zero_info

from opcd.models.hub_access import check_proxies
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import check
from opcd.runtime.output import hide, masked, shown

Result = TypeVar("Result")
Request = tuple[str, str, Any]
"""Method, path and JSON body."""

AGAIN = (408, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
POLL = 0.1
"""Seconds between two checks for a signal that ends the run."""
CONNECT = 10.0
"""Seconds for a connection to be made."""
FIRST, LONGEST = 0.25, 30.0
"""Longest first pause and longest pause of all, in seconds; each pause is drawn between half of its limit and all."""
LARGEST = 2**28
"""Bytes of the largest answer: a table of 20 tokens at 8,000 positions takes 16 MiB."""
SHOWN = 300
"""Most characters of a server's own message in an error."""

_draw = random.Random()  # a generator of its own: a server must not change the draws of training


class ServerError(Exception):
    """An error about a server that does not give what it is asked for.

    Args:
        message: the server's address, and what it did.
        status: the HTTP status, where the server refused.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(shown(message))  # a server's message may hold anything, the key too
        self.status = status


class _Again(Exception):
    """A failure that may pass: the reason, and the server's Retry-After."""

    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(shown(problem))
        self.retry_after = retry_after


@dataclass(frozen=True)
class Shortcut(Generic[Result]):
    """Cheaper requests, each tried once before the ordinary request with the same number.

    Args:
        path: the path of the requests.
        bodies: one for each ordinary body.
        read: as in `Server.post`.
    """

    path: str
    bodies: list[Any]
    read: Callable[[Any, int], Result]


class Server:
    """A server that answers requests with JSON.

    Args:
        base_url: http(s)://host:port, and a path where there is one.
        key_env: the environment variable that holds the server's key; if it is not set, no key is sent.
        concurrency: requests in flight at a time.
        timeout: seconds of one attempt.
        patience: seconds after a request's first attempt within which further attempts begin.

    Raises:
        ValueError: the address is invalid or holds a secret, the variable's name is invalid, or a number is out of
            range.
    """

    def __init__(self, base_url: str, key_env: str, concurrency: int, timeout: float, patience: float) -> None:
        _check_url(base_url)
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_env):  # the value is not shown: it may be a key
            raise ValueError(
                "api_key_env must be the name of an environment variable (capital letters, digits, _); a key itself "
                "must not be in a config, which is saved with the run"
            )
        if concurrency < 1 or not timeout > 0 or not patience >= 0:
            raise ValueError(
                f"a server needs concurrency >= 1, timeout > 0 and patience >= 0, got concurrency {concurrency}, "
                f"timeout {timeout:g} s, patience {patience:g} s"
            )
        self.base_url, self.key_env = base_url.rstrip("/"), key_env
        self.concurrency, self.timeout, self.patience = concurrency, timeout, patience
        self._failed: set[str] = set()  # paths of shortcuts whose failure has been logged

    def get(self, path: str, patience: float | None = None) -> Any:
        """Get the JSON at a path, or raise ServerError; `patience` may be less than the server's."""
        return self._all([("GET", path, None)], lambda answer, _: answer, patience)[0]

    def post(
        self,
        path: str,
        bodies: list[Any],
        read: Callable[[Any, int], Result],
        shortcut: Shortcut[Result] | None = None,
        patience: float | None = None,
    ) -> list[Result]:
        """Post all bodies; return what `read` makes of each answer's JSON and the body's number, in the bodies' order.

        Raises:
            ServerError: of the first request that fails, or of `read`; the other requests are then cancelled.
        """
        return self._all([("POST", path, body) for body in bodies], read, patience, shortcut)

    def _all(
        self,
        requests: list[Request],
        read: Callable[[Any, int], Result],
        patience: float | None,
        shortcut: Shortcut[Result] | None = None,
    ) -> list[Result]:
        least = self.patience if patience is None else min(patience, self.patience)
        # In another thread: in a notebook the main one has an event loop already, and it must receive signals.
        left = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            try:
                return thread.submit(asyncio.run, self._gather(requests, read, least, left, shortcut)).result()
            finally:
                left.set()  # an interrupt in this thread must not wait for the requests

    async def _gather(
        self,
        requests: list[Request],
        read: Callable[[Any, int], Result],
        patience: float,
        left: threading.Event,
        shortcut: Shortcut[Result] | None,
    ) -> list[Result]:
        room, told = asyncio.Semaphore(self.concurrency), asyncio.Event()
        timeout, limits = httpx2.Timeout(None, connect=CONNECT), httpx2.Limits(max_connections=self.concurrency)
        try:
            check_proxies()
        except UserError as error:
            raise ServerError(str(error)) from error
        async with httpx2.AsyncClient(headers=self._headers(), timeout=timeout, limits=limits) as client:

            async def one(number: int) -> Result:
                """Make one request, by the shortcut where that succeeds."""
                async with room:
                    if shortcut and (found := await self._taken(client, shortcut, number)) is not None:
                        return found
                    return read(await self._answer(client, requests[number], patience, told), number)

            tasks = [asyncio.create_task(one(number)) for number in range(len(requests))]
            pending = set(tasks)
            try:
                while pending and not left.is_set():
                    done, pending = await asyncio.wait(pending, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                    for task in done:
                        task.result()
                    check()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return [task.result() for task in tasks]

    async def _answer(self, client: httpx2.AsyncClient, request: Request, patience: float, told: asyncio.Event) -> Any:
        """The JSON of the first attempt that succeeds; `told` is set once a message about retries has been logged."""
        where = self.base_url + request[1]
        begun, attempt = time.monotonic(), 0
        while True:
            attempt += 1
            try:
                return await self._attempt(client, request)
            except _Again as problem:
                wait = pause(attempt, problem.retry_after)
                seconds = time.monotonic() - begun
                if seconds + wait > patience:
                    raise ServerError(
                        f"{where}: {problem}; given up after {attempt} attempts in {seconds:.1f} s"
                    ) from problem
                if not told.is_set():
                    told.set()
                    rank_zero_info(f"{where}: {problem}; retried for up to {patience:g} s")
            await asyncio.sleep(wait)

    async def _attempt(self, client: httpx2.AsyncClient, request: Request) -> Any:
        method, path, body = request
        where, content = self.base_url + path, bytearray()
        try:
            async with asyncio.timeout(self.timeout), client.stream(method, where, json=body) as response:
                async for piece in response.aiter_bytes():
                    content += piece
                    if len(content) > LARGEST:
                        raise ServerError(f"{where}: its answer is larger than {LARGEST >> 20} MiB")
        except TimeoutError:
            raise _Again(f"no answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _Again(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code in AGAIN:
            raise _Again(_said(response, content), response.headers.get("Retry-After"))
        if response.status_code != 200:
            key = f"; the key comes from the environment variable {self.key_env}"
            hint = key if response.status_code in (401, 403) else ""
            raise ServerError(f"{where}: {_said(response, content)}{hint}", response.status_code)
        try:
            return json.loads(content)
        except RecursionError as error:
            raise ServerError(f"{where}: its answer is nested too deeply") from error
        except ValueError as error:
            raise _Again("its answer is truncated or invalid JSON") from error

    async def _taken(self, client: httpx2.AsyncClient, shortcut: Shortcut[Result], number: int) -> Result | None:
        """The result of a shortcut's request; None where it fails."""
        try:
            answer = await self._attempt(client, ("POST", shortcut.path, shortcut.bodies[number]))
            return shortcut.read(answer, number)
        except (ServerError, _Again) as problem:
            if shortcut.path not in self._failed:
                self._failed.add(shortcut.path)
                where = "" if isinstance(problem, ServerError) else f"{self.base_url}{shortcut.path}: "
                rank_zero_info(
                    f"{where}{problem}; the ordinary request is made instead, here and where this fails again"
                )
            return None

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", key):  # a later error would show the key
            raise ServerError(f"the environment variable {self.key_env} is not a key: it has blanks or non-ASCII text")
        hide(key)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _said(response: httpx2.Response, content: bytearray) -> str:
    """The status and the beginning of the server's own message."""
    words = content[: 4 * SHOWN].decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        words = str(json.loads(content)["error"]["message"])
    return f"HTTP {response.status_code} {' '.join(masked(words).split())[:SHOWN]}".strip()


def pause(attempt: int, retry_after: str | None) -> float:
    """Seconds to wait after the n-th attempt (from 1): exponential backoff with jitter, at least Retry-After."""
    longest = min(FIRST * 2.0 ** min(attempt - 1, 16), LONGEST)
    return max(_draw.uniform(longest / 2, longest), _asked(retry_after))


def _asked(retry_after: str | None) -> float:
    """Seconds of a Retry-After header, which is a number or a date; 0 for anything else."""
    if retry_after is None:
        return 0.0
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return parsedate_to_datetime(retry_after).timestamp() - time.time()
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _check_url(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.userinfo or url.query or url.fragment or "@" in base_url:  # not shown: it may be a key
        raise ValueError("base_url must be http(s)://host:port only: a name, a key or a query must not be in a config")
    if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"base_url must be http(s)://host:port, without /v1, got {base_url!r}")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError(f"base_url: a port must be from 1 to 65535, got {url.port}")
