"""The metrics of a run during training: ``metrics.jsonl``, TensorBoard's files, and how the run ended."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import CheckpointError, MissingDependency
from .files import AppendedText, atomic_write
from .metrics import finite_or_none


class MetricsFile:
    """``metrics.jsonl``: one JSON object per line, each with ``event`` and ``step``.

    Parameters
    ----------
    path : Path
    after_step : int
        Where a run continues: events of later steps, which a stopped process wrote after its last checkpoint, are
        dropped, because these steps are taken again.
    tests_again : bool
        Whether all that is left to do is the test at that step, which replaces an earlier one.

    Raises
    ------
    CheckpointError
        If the file has a line that is not an event.
    """

    def __init__(self, path: Path, after_step: int = 0, tests_again: bool = False) -> None:
        if path.exists():
            kept = [
                line
                for line, event in read_events(path)
                if event["step"] <= after_step
                and not (tests_again and (event["event"], event["step"]) == ("test", after_step))
            ]
            with atomic_write(path) as file:
                file.writelines(kept)
        self._file = AppendedText(path)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append one event; numbers that are not finite are written as null, as JSON cannot express them."""
        finite = {name: finite_or_none(value) if isinstance(value, float) else value for name, value in values.items()}
        self._file.write(json.dumps({"event": event, "step": step, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The complete lines of a ``metrics.jsonl`` and their events; a last line that is being written is skipped.

    Raises
    ------
    CheckpointError
        For a line that is not an event.
    """
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            continue
        try:
            event = json.loads(line)
            if not isinstance(event["step"], int) or "event" not in event:
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} line {number}: is not an event of a run; remove the line, and resume again"
            ) from error
        yield line, event


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
        from tensorboardX.event_file_writer import EventsWriter  # SummaryWriter's thread dies if the disk is full
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.summary import text

        self._folder = folder
        with self._writing():
            folder.mkdir(exist_ok=True)
            # Its file names differ only by the second: a second file within one would replace the first.
            self._events = EventsWriter(str(folder / "events"), f".{after_step:012}")
        if after_step:
            self._add(after_step + 1, session_log=SessionLog(status=SessionLog.START))  # drops later steps
        self._add(0, summary=text("configuration", "".join(f"    {line}\n" for line in configuration.splitlines())))

    def write(self, event: str, step: int, **values: Any) -> None:
        """Add each number of an event that is finite."""
        from tensorboardX.summary import scalar

        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self._add(step, summary=scalar(f"{event}/{name}", value))

    def close(self) -> None:
        """Close the file."""
        with self._writing():
            self._events.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with self._writing():
            self._events.write_event(Event(wall_time=time.time(), step=step, **content))
            self._events.flush()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._folder)) from error


def require_tensorboard() -> None:
    """Raise `MissingDependency` if TensorBoard's files cannot be written."""
    if find_spec("tensorboardX") is None:
        raise MissingDependency(
            "--tensorboard: needs the package tensorboardX; pip install 'gluon_lm[tensorboard]', or go on without: "
            "--no-tensorboard"
        )


def write_status(path: Path, state: str, reason: str | None = None) -> None:
    """Write to a run's ``status.json`` that it is running, or how it ended: finished, stopped or failed."""
    with atomic_write(path) as file:
        status = {"state": state, "reason": reason, "time": time.time(), "pid": os.getpid()}
        file.write((json.dumps(status) + "\n").encode("utf-8"))
