"""JSON over HTTP, several requests at a time, and none that is waited for without end.

How a request goes: an attempt has `timeout` seconds. Where it may succeed the next time (no connection, no answer in
time, 429, 5xx, JSON that is cut), another one follows after a pause that doubles, or that the server asks for
(Retry-After). Where it would begin later than `patience` seconds after the first, or where the server refuses,
`ServerError` says why.
"""

import asyncio
import itertools
import json
import os
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2
from lightning.pytorch.utilities import rank_zero_info

from opcd.models.hub_access import check_proxies
from opcd.runtime.errors import UserError
from opcd.runtime.interruption import check
from opcd.runtime.output import hide, masked, shown
from opcd.serving.pauses import pause

Result = TypeVar("Result")

AGAIN = (408, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed."""
POLL = 0.1
"""Seconds between two looks for a signal that ends the run."""
CONNECT = 10.0
"""Seconds until a machine that does not answer counts as away."""
LARGEST = 2**28
"""Bytes of the largest answer: a table of 20 tokens at 8,000 positions takes 16 MiB."""
SHOWN = 300
"""Characters of what a server says in an error."""


class ServerError(Exception):
    """A server that does not give what it is asked for: what it did, and its address.

    Args:
        message: for the user.
        status: of its answer, where it refused.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(shown(message))  # a server's words may hold anything, the key too
        self.status = status


class _Again(Exception):
    """An attempt that failed and may succeed the next time: why, and the server's Retry-After."""

    def __init__(self, problem: str, retry_after: str | None = None) -> None:
        super().__init__(shown(problem))
        self.retry_after = retry_after


@dataclass(frozen=True)
class Shortcut(Generic[Result]):
    """A cheaper request in place of each body's own, which follows where this one fails; made once.

    Args:
        path: where.
        bodies: one for each body that it stands for.
        read: as that of `Server.post`.
    """

    path: str
    bodies: list[Any]
    read: Callable[[Any, int], Result]


class Server:
    """A server's address, and how patiently it is asked.

    Args:
        base_url: http(s)://host:port, and a path where there is one.
        key_env: environment variable that holds its key; where it is not set, no key is sent.
        concurrency: requests in flight at a time.
        timeout: seconds of one attempt.
        patience: seconds after a request's first attempt within which others are begun.

    Raises:
        ValueError: for an address that is none or holds a secret, a variable's name that is none, or numbers that make
            no sense.
    """

    def __init__(self, base_url: str, key_env: str, concurrency: int, timeout: float, patience: float) -> None:
        _check_url(base_url)
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", key_env):  # the value is not shown: it may be a key
            raise ValueError(
                "api_key_env must be the name of an environment variable (capital letters, digits, _); a key itself "
                "has no place in a config, which is saved with the run"
            )
        if concurrency < 1 or not timeout > 0 or not patience >= 0:
            raise ValueError(
                f"a server wants concurrency >= 1, timeout > 0 and patience >= 0, got concurrency {concurrency}, "
                f"timeout {timeout:g} s, patience {patience:g} s"
            )
        self.base_url, self.key_env = base_url.rstrip("/"), key_env
        self.concurrency, self.timeout, self.patience = concurrency, timeout, patience
        self._failed: set[str] = set()  # paths of shortcuts of which the user knows

    def get(self, path: str, patience: float | None = None) -> Any:
        """The JSON at a path. ServerError where it cannot be had; `patience` may be less than the server's."""
        return self._all([("GET", path, None)], lambda answer, _: answer, patience)[0]

    def post(
        self,
        path: str,
        bodies: list[Any],
        read: Callable[[Any, int], Result],
        shortcut: Shortcut[Result] | None = None,
        patience: float | None = None,
    ) -> list[Result]:
        """What `read` makes of the JSON that each body is answered with, and of the body's number; in their order.

        ServerError for the first that cannot be had, or that `read` raises; the others are then given up.
        """
        return self._all([("POST", path, body) for body in bodies], read, patience, shortcut)

    def _all(
        self,
        requests: list[tuple[str, str, Any]],
        read: Callable[[Any, int], Result],
        patience: float | None,
        shortcut: Shortcut[Result] | None = None,
    ) -> list[Result]:
        least = self.patience if patience is None else min(patience, self.patience)
        # A thread of its own: a notebook has an event loop in the main one, and signals are noticed there meanwhile.
        left = threading.Event()
        with ThreadPoolExecutor(1) as thread:
            try:
                return thread.submit(asyncio.run, self._gather(requests, read, least, left, shortcut)).result()
            finally:
                left.set()  # an interrupt in this thread, in a notebook, must not wait for the other

    async def _gather(
        self,
        requests: list[tuple[str, str, Any]],
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
                """What is read out of the answer to a request."""
                async with room:
                    if shortcut and (found := await self._taken(client, shortcut, number)) is not None:
                        return found
                    return read(await self._answer(client, *requests[number], patience, told), number)

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

    async def _answer(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any, patience: float, told: asyncio.Event
    ) -> Any:
        """The JSON of the first attempt that succeeds; `told`: whether the user knows that it may take a while."""
        begun = time.monotonic()
        for attempt in itertools.count(1):
            try:
                return await self._attempt(client, method, path, body)
            except _Again as problem:
                wait = pause(attempt, problem.retry_after)
                seconds = time.monotonic() - begun
                if seconds + wait > patience:
                    raise ServerError(
                        f"{self.base_url}{path}: {problem}; given up after {attempt} attempts in {seconds:.1f} s"
                    ) from problem
                if not told.is_set():
                    told.set()
                    rank_zero_info(f"{self.base_url}{path}: {problem}; asked again for up to {patience:g} s")
            await asyncio.sleep(wait)
        raise AssertionError("counting has no end")

    async def _attempt(self, client: httpx2.AsyncClient, method: str, path: str, body: Any) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                response, content = await self._received(client, method, path, body)
        except TimeoutError:
            raise _Again(f"no answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _Again(f"{type(error).__name__}: {error}".rstrip(": ")) from error
        if response.status_code in AGAIN:
            raise _Again(_said(response, content), response.headers.get("Retry-After"))
        if response.status_code != 200:
            key = f"; the key comes from the environment variable {self.key_env}"
            hint = key if response.status_code in (401, 403) else ""
            raise ServerError(f"{self.base_url}{path}: {_said(response, content)}{hint}", response.status_code)
        try:
            return json.loads(content)
        except RecursionError as error:
            raise ServerError(f"{self.base_url}{path}: its answer is nested too deep") from error
        except ValueError as error:
            raise _Again("its answer is no whole JSON") from error

    async def _received(
        self, client: httpx2.AsyncClient, method: str, path: str, body: Any
    ) -> tuple[httpx2.Response, bytes]:
        """A response and its content, which is not read without end."""
        content = bytearray()
        async with client.stream(method, self.base_url + path, json=body) as response:
            async for piece in response.aiter_bytes():
                content += piece
                if len(content) > LARGEST:
                    raise ServerError(f"{self.base_url}{path}: its answer is larger than {LARGEST >> 20} MiB")
        return response, bytes(content)

    async def _taken(self, client: httpx2.AsyncClient, shortcut: Shortcut[Result], number: int) -> Result | None:
        """What a shortcut gives in place of a body; None where it fails."""
        try:
            answer = await self._attempt(client, "POST", shortcut.path, shortcut.bodies[number])
            return shortcut.read(answer, number)
        except (ServerError, _Again) as problem:
            if shortcut.path not in self._failed:
                self._failed.add(shortcut.path)
                where = "" if isinstance(problem, ServerError) else f"{self.base_url}{shortcut.path}: "
                rank_zero_info(f"{where}{problem}; asked in the ordinary way, here and where it fails again")
            return None

    def _key(self) -> str:
        return os.environ.get(self.key_env, "").strip()

    def _headers(self) -> dict[str, str]:
        key = self._key()
        if not re.fullmatch(r"[!-~]*", key):  # it would be shown by whoever refuses it later
            raise ServerError(f"the environment variable {self.key_env} holds no key: blanks or other than ASCII")
        hide(key)
        return {"Authorization": f"Bearer {key}"} if key else {}


def _said(response: httpx2.Response, content: bytes) -> str:
    """The status and the beginning of a server's own words."""
    words = content[: 4 * SHOWN].decode("utf-8", "replace")
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        words = str(json.loads(content)["error"]["message"])
    return f"HTTP {response.status_code} {' '.join(masked(words).split())[:SHOWN]}".strip()


def _check_url(base_url: str) -> None:
    try:
        url = httpx2.URL(base_url)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.userinfo or url.query or url.fragment or "@" in base_url:  # not shown: it may be a key
        raise ValueError(
            "base_url must be http(s)://host:port alone: a name, a key or a query has no place in a config"
        )
    if url.scheme not in ("http", "https") or not url.host or url.path.rstrip("/").endswith("/v1"):
        raise ValueError(f"base_url must be http(s)://host:port, without the /v1 that follows, got {base_url!r}")
    if url.port is not None and not 0 < url.port < 65536:
        raise ValueError(f"base_url: a port lies between 1 and 65535, got {url.port}")
