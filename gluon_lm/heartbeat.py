"""Signs that long work gets on, for whatever watches this process and ends it when it hangs."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[], object]] = []


def beat() -> None:
    """Called in the course of all long work, by the code that does it, after each piece; cheap."""
    for listener in _listeners:
        listener()


def listen(listener: Callable[[], object]) -> None:
    """Have `listener` called at each beat, for as long as this process lives."""
    _listeners.append(listener)
