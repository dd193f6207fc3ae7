"""Processes that tests start."""

from __future__ import annotations

import time


def wait_for(condition, process, seconds=60):
    """Wait until `condition()` holds while a process works."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
