"""Heartbeats of long work, so that a watchdog can tell slow from hung."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[int | None], object]] = []


def beat(step: int | None = None) -> None:
    """Called by all long work after each piece of it; cheap.

    Training calls it before each step, with that step's number.
    """
    for listener in _listeners:
        listener(step)


def listen(listener: Callable[[int | None], object]) -> None:
    """Have `listener` called at each beat, with the step or None, as long as this process lives."""
    _listeners.append(listener)
