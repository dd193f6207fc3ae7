"""Processes that tests start, and what they found out."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import time
from pathlib import Path

import numpy as np
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


def figures(output: str, split: str) -> tuple[float, int]:
    """Perplexity of a text and its number of tokens, as a command printed them."""
    found = re.search(rf"^{split} loss \S+ \| perplexity (\S+) \| bits per word \S+ \| tokens (\d+)$", output, re.M)
    assert found, output
    return float(found[1]), int(found[2])


def events(run: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Notes:
    """What one rank found, kept for the tests."""

    def __init__(self, folder, rank):
        self._path, self._values, self._arrays = Path(folder) / f"rank{rank}", {}, {}

    def keep(self, name, found):
        if isinstance(found, list) and found and all(isinstance(array, np.ndarray) for array in found):
            self._arrays.update({f"{name}/{i}": array for i, array in enumerate(found)})
        elif isinstance(found, dict) and all(isinstance(array, np.ndarray) for array in found.values()):
            self._arrays.update({f"{name}/{key}": array for key, array in found.items()})
        else:
            self._values[name] = found

    def write(self):
        np.savez(self._path.with_suffix(".npz"), **self._arrays)
        self._path.with_suffix(".json").write_text(json.dumps(self._values))


class Found:
    """What the ranks of one scenario kept."""

    def __init__(self, folder, num_processes):
        self.ranks = range(num_processes)
        self._values = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in self.ranks]
        self._arrays = [dict(np.load(folder / f"rank{rank}.npz")) for rank in self.ranks]

    def values(self, name):
        """By rank."""
        return [values.get(name) for values in self._values]

    def arrays(self, name):
        """By rank, the arrays whose name begins so, by the rest of it."""
        return [
            {key[len(name) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{name}/")}
            for arrays in self._arrays
        ]


def processes_in(folder):
    """Ids of the processes that run in a folder, except for the tests' own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if os.readlink(entry / "cwd").startswith(str(folder)) and int(entry.name) != os.getpid():
                found.append(int(entry.name))
    return found


def wait_until_none_is_left(folder, seconds=20):
    """Wait until no process runs in a folder any more."""
    deadline = time.monotonic() + seconds
    while left := processes_in(folder):
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
