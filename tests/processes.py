"""Processes that tests start."""

from __future__ import annotations

import importlib.util
import time

import pytest

HAS_HOROVOD = importlib.util.find_spec("horovod") is not None
NO_HOROVOD = "Horovod is not installed here: bash scripts/install_horovod.sh"
with_horovod = pytest.mark.skipif(not HAS_HOROVOD, reason=NO_HOROVOD)


def wait_for(condition, process, seconds=60):
    """Wait until `condition()` holds while a process works."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
