"""The HTTP server that the application runs in."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from ..logs import LOGGER, RESULT
from .engine import Engine
from .guard import SECONDS_TO_SEND
from .limits import Limits


def run_server(app: Any, limits: Limits, listener: socket.socket) -> None:
    """Serve an application of `create_app` until a signal comes.

    Parameters
    ----------
    app : FastAPI
    limits : Limits
    listener : socket
        Bound; it is closed at the end.

    Raises
    ------
    Exception
        If the engine could not start.
    """
    engine: Engine = app.state.engine
    config = uvicorn.Config(
        app,
        http=_protocol(limits.timeout),
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
    )
    try:
        _Server(config, engine, listener).run(sockets=[listener])
    finally:
        engine.close(0)  # in case a second Ctrl-C left no time for the application to do so


class _Server(uvicorn.Server):
    """Logs where it listens and, on the first signal, how much is left to do; shuts down cleanly on any."""

    def __init__(self, config: uvicorn.Config, engine: Engine, listener: socket.socket) -> None:
        super().__init__(config)
        self._engine, self._address = engine, listener.getsockname()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        try:
            await asyncio.get_running_loop().run_in_executor(None, self._engine.wait_until_ready)
        except Exception:
            self.force_exit = True  # nothing to wait for
            await self.shutdown(sockets)
            raise
        if self.should_exit:  # by a signal in the meantime, after which some versions would exit at once
            await self.shutdown(sockets)
            return
        host, port, *_ = self._address
        LOGGER.log(RESULT, "serving at http://%s:%d/ (Ctrl-C stops)", f"[{host}]" if ":" in host else host, port)

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # which leaves tasks to the event loop, and that complains about them
            tasks = list(self.server_state.tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        self.install_signal_handlers()
        yield

    def install_signal_handlers(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._stop, number)

    def _stop(self, number: signal.Signals) -> None:
        if self.should_exit:
            self.force_exit |= number == signal.SIGINT
            return
        self.should_exit = True
        LOGGER.info("%s: finishing %d text(s); Ctrl-C again stops at once", number.name, self._engine.num_live)


def _protocol(seconds: float) -> type[asyncio.Protocol]:
    """The HTTP protocol of uvicorn, but closing connections on which the head of a request does not arrive in time.

    So are those on which the client has stopped reading the answer.
    """

    class Protocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _closing: asyncio.TimerHandle | None = None
        _reading: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()
            self._stop_waiting()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._wait_for_reader()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_waiting()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._wait_for_reader()

        def _wait_for_reader(self, unread_before: float = math.inf) -> None:
            """Close the connection once the client has read nothing of the remaining answer for too long."""
            self._stop_waiting()
            unread = self.transport.get_write_buffer_size()
            if unread >= unread_before:
                self.transport.abort()
            elif unread:
                self._reading = self.loop.call_later(seconds + SECONDS_TO_SEND, self._wait_for_reader, unread)

        def _stop_waiting(self) -> None:
            if self._reading is not None:
                self._reading.cancel()
                self._reading = None

        def _watch(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:
                self._forget()  # the head of a request has arrived, and the application watches the rest
            elif self._closing is None:
                self._closing = self.loop.call_later(seconds, self.transport.close)

        def _forget(self) -> None:
            if self._closing is not None:
                self._closing.cancel()
                self._closing = None

    return Protocol
