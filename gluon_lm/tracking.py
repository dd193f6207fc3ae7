"""The numbers of a run, in ``metrics.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .files import atomic_write


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
            kept = [
                line
                for line in path.read_text(encoding="utf-8").splitlines(keepends=True)
                if line.endswith("\n") and json.loads(line)["step"] <= after_step
            ]
            with atomic_write(path) as file:
                file.write("".join(kept).encode("utf-8"))
        self._file = open(path, "a", encoding="utf-8")

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one event; numbers that are not finite are written as null, for JSON has none."""
        finite = {
            name: None if isinstance(value, float) and value - value != 0 else value for name, value in values.items()
        }
        self._file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
