"""Ctrl-C, SIGTERM and a closed terminal, handled between two steps."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

from ..distributed.control import LOCAL_WORKER_VARIABLE
from ..logs import LOGGER, detach_terminal, tolerate_closed_pipes


class Stopped(Exception):
    """Raised in the middle of work that a stop request ends, and that is done again when the run continues."""


class StopRequest:
    """While entered, notes SIGINT, SIGTERM and SIGHUP in `signal`; a second SIGINT interrupts at once.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored. Only the main thread can handle signals, so in another
    thread it notes none. A worker of a launcher may get every signal twice, from whoever signals all processes and from
    the launcher; there, no signal interrupts it at once, as the launcher decides what is urgent and reads its output.

    Attributes
    ----------
    signal : signal.Signals or None
        The signal that asked to stop.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._has_launcher = LOCAL_WORKER_VARIABLE in os.environ
        self._was_asked = False
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def exit_code(self) -> int:
        """The exit code that a shell expects after such a signal; 0 without one."""
        return 0 if self.signal is None else 128 + int(self.signal)

    def check(self) -> None:
        """Raise `Stopped` if a signal has asked to stop."""
        if self.signal is not None:
            raise Stopped

    def take_over(self, number: int) -> None:
        """Stop because of another process's signal, which may also have ended the reader of this one's output."""
        tolerate_closed_pipes()
        self.signal = signal.Signals(number)

    def __enter__(self) -> StopRequest:
        is_main = threading.current_thread() is threading.main_thread()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        was_asked, self._was_asked = self._was_asked, True
        if not self._has_launcher:
            if was_asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            if number == signal.SIGHUP:
                detach_terminal(and_pipes=True)
        tolerate_closed_pipes()
        self.signal = signal.Signals(number)
        if self._has_launcher and was_asked:
            return
        then = "Ctrl-C again stops at once" if number == signal.SIGINT else "the run can go on from there"
        with contextlib.suppress(RuntimeError):  # the signal came while another line was being written
            LOGGER.info("%s: stopping after this step; %s", self.signal.name, then)
