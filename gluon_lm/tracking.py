"""The numbers of a run while it is trained: ``metrics.jsonl``, TensorBoard's files, and how the run ended."""

from __future__ import annotations

import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MissingDependency
from .files import atomic_write


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, each with ``event`` and ``step``.

    The file is locked as long as it is written to, which tells others that the run is being trained.

    Parameters
    ----------
    path : Path
    after_step : int
        Where a run goes on: events of later steps, which a stopped process wrote after its last checkpoint, are
        dropped, because they are about to happen again.

    Raises
    ------
    CheckpointError
        If another process is writing to it.
    """

    def __init__(self, path: Path, after_step: int = 0) -> None:
        if path.exists():
            if is_being_written(path):
                raise _being_trained(path)
            kept = [line for line, event in read_events(path) if event["step"] <= after_step]
            with atomic_write(path) as file:
                file.write("".join(kept).encode("utf-8"))
        self._file = open(path, "a", encoding="utf-8")
        if _is_locked(self._file.fileno(), fcntl.LOCK_EX):
            self._file.close()
            raise _being_trained(path)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one event; numbers that are not finite are written as null, for JSON has none."""
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The whole lines of a ``metrics.jsonl`` and their events; a last line that is being written is left out.

    Raises
    ------
    ValueError
        For a line that is no event.
    """
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            event = json.loads(line)
            if not (isinstance(event, dict) and isinstance(event.get("step"), int) and "event" in event):
                raise ValueError(f"{line[:40]!r} is no event")
            yield line, event


def is_being_written(path: Path) -> bool:
    """Whether a process, which is alive, has a `MetricsFile` open."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        return _is_locked(descriptor, fcntl.LOCK_SH)
    finally:
        os.close(descriptor)


def _is_locked(descriptor: int, kind: int) -> bool:
    """Whether another process holds the lock of an open file; else this one does, until it closes the file."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass  # some network file systems have no locks
    return False


def _being_trained(path: Path) -> CheckpointError:
    return CheckpointError(f"{path.parent}: is being trained by another process; stop that one, or name another run")


class TensorBoard:
    """The same events as scalars ``train/loss``, ``valid/perplexity``, ... in files that TensorBoard reads.

    Parameters
    ----------
    folder : Path
    after_step : int
        As `MetricsFile` takes it.
    configuration : str
        YAML, shown as a text.
    """

    def __init__(self, folder: Path, after_step: int, configuration: str) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=after_step + 1 if after_step else None)
        self._writer.add_text("configuration", "".join(f"    {line}\n" for line in configuration.splitlines()))

    def write(self, event: str, step: int, **values: Any) -> None:
        """Add each number of an event that is finite."""
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self._writer.add_scalar(f"{event}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


def require_tensorboard() -> None:
    """Raise `MissingDependency` where TensorBoard's files cannot be written."""
    if find_spec("tensorboardX") is None:
        raise MissingDependency(
            "--tensorboard: needs the package tensorboardX; pip install 'gluon_lm[tensorboard]', or leave it out"
        )


def write_status(path: Path, state: str, reason: str | None = None) -> None:
    """Note in a run's ``status.json`` that it is running, or how it ended: finished, stopped or failed."""
    with atomic_write(path) as file:
        status = {"state": state, "reason": reason, "time": time.time(), "pid": os.getpid()}
        file.write((json.dumps(status) + "\n").encode("utf-8"))
