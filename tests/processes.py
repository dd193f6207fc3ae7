"""Processes that tests start, how they wait for them and find them, and what they found out."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
HAS_HOROVOD = importlib.util.find_spec("horovod") is not None
NO_HOROVOD = "Horovod is not installed here: bash scripts/install_horovod.sh"
with_horovod = pytest.mark.skipif(not HAS_HOROVOD, reason=NO_HOROVOD)

Value = TypeVar("Value")


def environment(**variables: str) -> dict[str, str]:
    """The environment of a process that a test starts: the tests' own, this package, and these variables.

    If a library crashes it, it says what it was doing.
    """
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **variables}


def as_script(file: str) -> tuple[str, ...]:
    """What Python is asked for to run a file of tests: as tests/conftest.py does, gluon_lm comes before MXNet."""
    return ("-c", "import gluon_lm, runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')", file)


class Process(subprocess.Popen):
    """A process whose output, both streams in one, is read as it comes.

    Attributes
    ----------
    lines : list of str
        What it has said so far, without line breaks.
    """

    def __init__(self, *words: object, env: dict[str, str] | None = None, **settings) -> None:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        super().__init__([*map(str, words)], env=env or environment(), text=True, **{**pipes, **settings})
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        if self.stdout is not None:
            with self.stdout:
                for line in self.stdout:
                    self.lines.append(line.rstrip("\n"))

    def communicate(self, input: None = None, timeout: float | None = None) -> tuple[str, None]:
        """Wait for its end; all that it said."""
        self._reader.join(timeout)
        if self._reader.is_alive():
            raise subprocess.TimeoutExpired(self.args, timeout, "\n".join(self.lines))
        self.wait(timeout)
        return "".join(f"{line}\n" for line in self.lines), None

    def wait_for(self, text: str, times: int = 1) -> str:
        """Wait until so many lines have held a text; the last of them."""
        return wait_until(lambda: [line for line in self.lines if text in line][times - 1 :], 120, self)[0]


def wait_until(condition: Callable[[], Value], seconds: float = 60, process: subprocess.Popen | None = None) -> Value:
    """What `condition()` returns once that is true.

    With a process, which should bring it about, there is nothing more to wait for when that has ended.
    """
    end, outcome = time.monotonic() + seconds, ""
    while not (value := condition()):
        if not outcome and time.monotonic() > end:
            outcome = "\n".join([f"{seconds} s are over", *getattr(process, "lines", ())])
        if outcome:
            what = inspect.getsource(condition).strip() if inspect.isfunction(condition) else condition
            raise AssertionError(f"waited in vain for {what}: {outcome}")
        if process is not None and process.poll() is not None:
            outcome = f"exit code {process.returncode}\n{process.communicate()[0]}"  # and one more look
        else:
            time.sleep(0.02)
    return value


def running(folder: Path, words: str = "", setting: str = "") -> list[int]:
    """Ids of the processes, other than the tests' own, that run in a folder or below it.

    Only of those whose command line has the words, each of which ends with a zero byte there, and whose environment
    has the setting, ``NAME=VALUE``.
    """
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if (
                int(entry.name) != os.getpid()
                and Path(os.readlink(entry / "cwd")).is_relative_to(folder)
                and words in os.fsdecode((entry / "cmdline").read_bytes())
                and setting in ["", *os.fsdecode((entry / "environ").read_bytes()).split("\0")]
            ):
                found.append(int(entry.name))
    return found


def figures(output: str, split: str) -> tuple[float, int]:
    """Perplexity of a text and its number of tokens, as a command printed them."""
    found = re.search(rf"^{split} loss \S+ \| perplexity (\S+) \| bits per word \S+ \| tokens (\d+)$", output, re.M)
    assert found, output
    return float(found[1]), int(found[2])


def events(run: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``, or those of a kind."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if kind in (None, event["event"])]


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
