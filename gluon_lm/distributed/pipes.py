"""What the supervisor and its agents are made of: one thread that decides, and threads that read and write for it.

Nothing that another process does, or fails to do, may block the deciding thread. So every pipe has a thread of its own,
and all of them report to one queue of events.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from .control import encode

TICK_S = 0.5
_READ_BYTES = 1 << 16
_LONGEST_LINE = 1 << 16
_CROWDED = 1000


class EventLoop:
    """Handles what `post` reports, one event after the other, by methods ``on_<kind>``, with an `on_tick` in between.

    Time-outs are counted in ticks of the loop and not by the clock: a process that was itself stopped for a while, or
    not scheduled, must not take its own silence for that of others.
    """

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._next_tick = 0.0

    def post(self, kind: str, *content: Any) -> None:
        """Report an event; from any thread, and from a signal handler."""
        self._events.put((kind, content))

    def on_tick(self) -> None:
        """Called about every `TICK_S` seconds, never twice for one wait."""

    def run_until(self, is_done: Callable[[], bool], timeout_s: float = float("inf")) -> bool:
        """Handle events until `is_done()`, for at most `timeout_s` seconds; returns `is_done()`."""
        end = time.monotonic() + timeout_s
        while not is_done():
            now = time.monotonic()
            if now >= end:
                return False
            if now >= self._next_tick:
                self._next_tick = now + TICK_S
                self.on_tick()
                continue
            try:
                kind, content = self._events.get(timeout=min(end, self._next_tick) - now)
            except queue.Empty:
                continue
            getattr(self, f"on_{kind}")(*content)
        return True


class Sender:
    """Writes to a pipe in a thread of its own; keeps what is not read yet, and drops it if the reader is gone."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._thread = start_thread(self._write)

    def send(self, *message: Any) -> None:
        """Queue a message; never blocks."""
        self._lines.put(encode(*message))

    def wait_for_room(self) -> None:
        """Wait until the other end has read most of what was sent, so that memory stays bounded."""
        while self._lines.qsize() > _CROWDED and self._thread.is_alive():
            time.sleep(0.01)

    def close(self, timeout_s: float = 0.0) -> None:
        """Close the pipe once everything is written; wait for that at most `timeout_s` seconds."""
        self._lines.put(None)
        self._thread.join(timeout_s)

    def _write(self) -> None:
        with self._file:
            for line in iter(self._lines.get, None):
                try:
                    rest = memoryview(line)
                    while rest:
                        rest = rest[os.write(self._file.fileno(), rest) :]
                except OSError:
                    return


def start_thread(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    """Start a thread that does not keep the process from ending."""
    thread = threading.Thread(target=target, args=arguments, daemon=True)
    thread.start()
    return thread


def read_messages(file: BinaryIO) -> Iterator[list[Any]]:
    """The messages that arrive, until the other end is gone.

    Other lines, which a login shell may print, are skipped.
    """
    with file:
        for line in file:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if isinstance(message, list) and message:
                yield message


def read_lines(file: BinaryIO) -> Iterator[str]:
    """The lines that a program prints, as a terminal shows them: a carriage return overwrites what is before it.

    So a progress bar leaves only its last state, and that only if a line feed follows it.
    """
    with file:
        rest = b""
        while True:
            block = os.read(file.fileno(), _READ_BYTES)
            *lines, rest = (rest + block).split(b"\n")
            rest = rest[rest.rstrip(b"\r").rfind(b"\r") + 1 :]
            is_cut = len(rest) >= _LONGEST_LINE or not block
            if is_cut and rest and not rest.endswith(b"\r"):
                lines, rest = [*lines, rest], b""
            for line in lines:
                yield line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
            if not block:
                return
