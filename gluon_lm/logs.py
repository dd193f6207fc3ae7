"""What a run says: plain lines on the terminal and in ``log.txt``, numbers in ``metrics.jsonl``."""

from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("gluon_lm")


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send the package's log lines to standard output, bare, and hold them for the file of a run that is made later.

    For commands; a library user configures logging.
    """
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [terminal, logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL)]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log lines to a file, with the time before each, beginning with those that were held."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    for held in [h for h in LOGGER.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
        held.setTarget(file)
        held.close()
        LOGGER.removeHandler(held)
    LOGGER.addHandler(file)
    try:
        yield
    finally:
        LOGGER.removeHandler(file)
        file.close()


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with ``event`` and ``step``.

    Parameters
    ----------
    path : Path
    after_step : int
        Where a run goes on: events of later steps, which a stopped process wrote after its last checkpoint, are
        dropped, because they are about to happen again.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                    if line.endswith("\n") and json.loads(line)["step"] <= after_step]
            fresh = path.with_name(f".{path.name}.new-{os.getpid()}")
            fresh.write_text("".join(kept), encoding="utf-8")
            fresh.replace(path)
        self._file = open(path, "a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one event; numbers that are not finite are written as null, for JSON has none."""
        finite = {name: None if isinstance(value, float) and value - value != 0 else value
                  for name, value in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
