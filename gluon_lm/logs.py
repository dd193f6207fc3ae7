"""What a run says: plain lines on the terminal and in ``log.txt``, numbers in ``metrics.jsonl``."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

LOGGER = logging.getLogger("gluon_lm")


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send the package's log lines to standard output, bare. For commands; a library user configures logging."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [handler]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


def log_to_file(path: Path) -> logging.Handler:
    """Append the package's log lines to a file, with the time before each; remove the handler when done."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    LOGGER.addHandler(handler)
    return handler


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
