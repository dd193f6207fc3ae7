"""What guards every request: its size, its time, its client's presence, its line in the log.

So the application behind it need not handle disconnects and time-outs itself: it is cancelled when the client goes away
or the time is up, and the work that it had submitted is then cancelled too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from concurrent.futures import Future
from typing import Any
from urllib.parse import urlsplit

from starlette.responses import Response

from ..logs import LOGGER
from .metrics import RequestMetrics

WORK = "gluon_lm.work"  # where in a request's scope the futures are that are cancelled when it ends
OUTCOME = "gluon_lm.outcome"  # and the status, for log and metrics only, of an error after an answer had begun
_METHODS = {"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"}
SECONDS_TO_SEND = 10.0
_CLIENT_GONE = 499  # the customary status, in log and metrics only
_STOPPING = "the server is stopping"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Any, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware.

    A path means the same with and without a slash at its end.

    Parameters
    ----------
    app : callable
    metrics : RequestMetrics
    max_body : int
        Bytes of a request; more are refused with 413.
    timeout : float
        Seconds for reading a request, and then for answering it. Sending has ten more, so that the application can
        still say why it stopped.
    root_path : str, optional
        A prefix that is removed from paths that have it.
    post_paths : collection of str
        Below `root_path`, POST to any path but these goes to ``/``.
    allowed_hosts : collection of str, optional
        Host names that requests may be addressed to, besides localhost and IP addresses; others are refused with 421,
        for in a browser any page can have a name of its own resolve to this machine. What a page of another site posts
        to such an address is refused with 403. None: nothing is.
    """

    def __init__(
        self,
        app: Application,
        metrics: RequestMetrics,
        max_body: int,
        timeout: float,
        root_path: str | None = None,
        post_paths: frozenset[str] = frozenset(),
        allowed_hosts: frozenset[str] | None = None,
    ) -> None:
        self._app, self._metrics, self._max_body, self._timeout = app, metrics, max_body, timeout
        self._root_path, self._post_paths, self._allowed_hosts = root_path, post_paths, allowed_hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, is_whole = time.perf_counter(), 0, False

        async def note_status(message: Message) -> None:
            nonlocal status, is_whole
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)

        asked = _printable((scope.get("raw_path") or scope["path"].encode()).decode("ascii", "replace"))
        client = _printable((scope.get("client") or ["-"])[0])  # which a header may have set
        method = scope["method"]
        scope = {**self._without_root(scope), WORK: []}
        if method == "HEAD":  # what GET answers; the server leaves the body out
            scope["method"] = "GET"
        try:
            refusal = await self._answer(scope, receive, note_status)
            if not is_whole:
                has_begun, status = bool(status), refusal[0]
                if not has_begun and status != _CLIENT_GONE:
                    await error_response(scope, *refusal)(scope, receive, note_status)
        finally:
            status = scope.get(OUTCOME, status)
            work: list[Future[Any]] = scope[WORK]
            for future in work:
                future.cancel()
            seconds = time.perf_counter() - began
            counted = method if method in _METHODS else "other"
            self._metrics.add(counted, getattr(scope.get("route"), "path", "other"), status, seconds)
            LOGGER.info("%s %s %s %d %.3f s", client, method, asked, status, seconds)

    def _without_root(self, scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        root, path = self._root_path, scope["path"]
        is_below = root is not None and (path == root or path.startswith(root + "/"))
        if is_below:
            path = path[len(root or "") :] or "/"
        if len(path) > 1:
            path = path.removesuffix("/")
        if is_below and scope["method"] == "POST" and path not in self._post_paths:
            path = "/"
        return {**scope, "path": path, "raw_path": path.encode()}

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> tuple[int, str]:
        """Run the application; returns how to refuse the request if it has not answered, or not completely."""
        try:
            body = await asyncio.wait_for(_read(receive, self._max_body), self._timeout)
        except asyncio.TimeoutError:
            return 408, f"the request did not arrive within {self._timeout:g} s"
        except asyncio.CancelledError:  # by the server, as below
            return 503, _STOPPING
        if body is None:
            return _CLIENT_GONE, "the client went away"
        if len(body) > self._max_body:
            return 413, f"the request is longer than {self._max_body} bytes"
        if self._allowed_hosts is not None:
            headers = dict(scope["headers"])
            host = headers.get(b"host", b"").decode("latin-1")
            if not _is_among(host, self._allowed_hosts):
                return 421, f"Host {_printable(host)}: is not a name of this server; see --allowed-hosts of serve"
            if scope["method"] == "POST" and _is_of_another_site(headers, host, self._allowed_hosts):
                own = "use this server's own, which over plain HTTP --allowed-hosts must name behind a proxy"
                return 403, f"a page of another site may not post here; {own}"
        gone = asyncio.ensure_future(_wait_for_disconnect(receive))
        answer = asyncio.ensure_future(self._app(scope, _replay(body, gone), send))
        try:
            await asyncio.wait(
                {gone, answer}, timeout=self._timeout + SECONDS_TO_SEND, return_when=asyncio.FIRST_COMPLETED
            )
            if answer.done():
                answer.result()
            if gone.done():
                return _CLIENT_GONE, "the client went away"
            return 503, f"no answer within {self._timeout:g} s"
        except asyncio.CancelledError:  # by the server, which has waited long enough
            return 503, _STOPPING
        except Exception:
            LOGGER.exception("a request failed")
            return 500, "internal error; the server's log has the details"
        finally:
            for task in (gone, answer):
                task.cancel()
            await asyncio.gather(gone, answer, return_exceptions=True)


async def _read(receive: Receive, max_bytes: int) -> bytes | None:
    """A request's body, complete or just too long; None if the client went away."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > max_bytes or not message.get("more_body", False):
            return bytes(body)


async def _wait_for_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(body: bytes, gone: asyncio.Future[None]) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await asyncio.wait({gone})
        return {"type": "http.disconnect"}

    return receive


def error_response(
    scope: MutableMapping[str, Any], status: int, detail: Any, headers: Mapping[str, str] | None = None
) -> Response:
    """An error with its reason: plain text to a form, JSON otherwise."""
    if (scope["method"], scope["path"]) == ("POST", "/"):
        return Response(f"{detail}\n", status, headers, "text/plain")
    return Response(json.dumps({"detail": detail}), status, headers, "application/json")


def _is_among(host: str, allowed: frozenset[str]) -> bool:
    """Whether a Host header is empty, or names this machine, an IP address or one of the allowed names."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(name))
    return not host or name == "localhost" or name.endswith(".localhost") or name in allowed


def _is_of_another_site(headers: Mapping[bytes, bytes], host: str, allowed: frozenset[str]) -> bool:
    """Whether a browser says that a request is from a page which neither this host nor an allowed one has served."""
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is not None or origin is None:
        return site == b"cross-site"
    # Over plain HTTP, browsers say the site to addresses of their own machine alone.
    try:
        page = urlsplit(origin.decode("latin-1")).hostname
    except ValueError:
        return True
    return page is None or page not in {urlsplit(f"//{host}").hostname, *allowed}


def _printable(sent: str) -> str:
    """What a client sent, without characters that could forge a line of the log."""
    return re.sub(r"[^!-~]", "?", sent[:200])
