"""Signs that long work gets on, for whatever watches this process and ends it when it hangs."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[int | None], object]] = []


def beat(step: int | None = None) -> None:
    """Called in the course of all long work, by the code that does it, after each piece; cheap.

    Training calls it before each step, with that step's number.
    """
    for listener in _listeners:
        listener(step)


def listen(listener: Callable[[int | None], object]) -> None:
    """Have `listener` called at each beat, with the step or None, for as long as this process lives."""
    _listeners.append(listener)
