"""The history of a run as its folder records it, read without MXNet, during training or after."""

from __future__ import annotations

import functools
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .config import read_config
from .errors import CheckpointError, ConfigError, reason
from .metrics import finite_or_none, perplexity
from .tracking import read_events
from .training.run_folder import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    STATE,
    RunFolder,
    checkpoint_step,
    finetunings,
)

STATES = ("running", "finished", "stopped", "failed")
UNTOLD = "or killed: no locks to tell by"  # the reason of a run that seems to be running


def run_folders(folder: Path) -> Iterator[Path]:
    """The folder itself if it is a run, else the runs in it, also broken ones, each followed by its finetuned ones."""
    if looks_like_a_run(folder):
        found = [folder]
    else:
        here = folder.resolve()
        inside = [path for path in sorted(folder.iterdir()) if os.path.isdir(path) and path.name[0] != "."]
        # A link such as runs/latest names one of them a second time.
        once = [path for path in inside if not (path.is_symlink() and path.resolve().parent == here)]
        found = [path for path in once if looks_like_a_run(path)]
    for path in found:
        yield path
        yield from finetunings(path)


def looks_like_a_run(path: Path) -> bool:
    """Whether a folder may be a run; one that cannot be read may."""
    may_look = os.access(path, os.X_OK)
    return not may_look or any((path / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS))


@dataclass(frozen=True)
class SavedCheckpoint:
    """A checkpoint of a run.

    Attributes
    ----------
    step : int
    epoch : int
        Complete passes over the training text by then.
    loss : float or None
        On the validation text, in nats per token, if it was evaluated.
    num_bytes : int
    num_parameters : int or None
        Of the model; None if it does not say.
    best_step : int or None
        The step with the lowest loss by then.
    corpus : str
        Name of the corpus that the run is trained on.
    text : str
        Digest of that text and of the vocabulary.
    """

    step: int
    epoch: int
    loss: float | None
    num_bytes: int
    num_parameters: int | None
    best_step: int | None
    corpus: str
    text: str


class RunHistory:
    """A run, as its folder describes it.

    Parameters
    ----------
    path : Path

    Attributes
    ----------
    folder : RunFolder
    config : Config
    events : list of dict
        The lines of ``metrics.jsonl``.
    state : str
        One of `STATES`: *running* while a process holds the run; otherwise how the last one ended. One that was
        killed left no record, and counts as *stopped*, or as *running* on a file system without locks, where the
        two cannot be told apart.
    reason : str or None
        Why it failed or stopped, where that is known.
    updated : float
        When something was last written, in seconds since 1970.

    Raises
    ------
    CheckpointError
        If the folder is not a run, or a file in it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.folder = folder = RunFolder(path)
        try:
            if not folder.config.is_file():
                raise CheckpointError(f"{path}: has no {CONFIG}, so it is not a run folder; name one")
            self.config = read_config(folder.config)
            lines = read_events(folder.metrics) if folder.metrics.exists() else ()
            self.events = [_checked(event) for _, event in lines]
            self.state, self.reason = self._read_state()
            found = [self._read_checkpoint(saved) for saved in folder.saved_checkpoints()]
            self.checkpoints = [saved for saved in found if saved is not None]
        except ConfigError as error:
            raise CheckpointError("; ".join(error.problems)) from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({reason(error)}); fix or move what is damaged") from error
        written = [folder.config, folder.metrics, folder.log, folder.status]
        self.updated = max(file.stat().st_mtime for file in written if file.exists())

    def _read_state(self) -> tuple[str, str | None]:
        is_held = self.folder.is_held
        if is_held:
            return "running", None
        if not self.folder.status.exists():
            return ("finished" if self.of("test") else "stopped"), None
        status = json.loads(self.folder.status.read_text(encoding="utf-8"))
        if status["state"] == "running":
            return ("running", UNTOLD) if is_held is None else ("stopped", "killed")
        if status["state"] not in STATES or not isinstance(status["reason"], (str, type(None))):
            raise ValueError(f"{self.folder.status.name}: state {status['state']!r}, reason {status['reason']!r}")
        return status["state"], status["reason"]

    def _read_checkpoint(self, path: Path) -> SavedCheckpoint | None:
        """None for one that has just been removed, as a run does with all but the newest."""
        step = checkpoint_step(path)
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
            num_bytes = sum(file.stat().st_size for file in path.iterdir())
        except FileNotFoundError:
            if path.exists():
                raise
            return None
        return SavedCheckpoint(
            step,
            int(state["training"]["epoch"]),
            next((event["loss"] for event in self.of("valid") if event["step"] == step), None),
            num_bytes,
            int(state.get("num_parameters", 0)) or None,
            state["training"]["best_step"],
            state["text"]["name"],
            state["corpus"],
        )

    def of(self, event: str) -> list[dict[str, Any]]:
        """All events of one kind: ``train``, ``valid``, ``test``."""
        return [one for one in self.events if one["event"] == event]

    def series(self, event: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps, and the finite values of one number, both float64 of shape (n,)."""
        points = [(one["step"], one[name]) for one in self.of(event) if one.get(name) is not None]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    @property
    def steps(self) -> int:
        """The last step on record."""
        return max([event["step"] for event in self.events] + [saved.step for saved in self.checkpoints], default=0)

    @property
    def epoch(self) -> int:
        """Complete passes over the training text on record."""
        counted = [event for event in self.events if event.get("epoch") is not None]
        # A training event names the current epoch, from 1 on; an evaluation counts the completed ones.
        return max((event["epoch"] - (event["event"] == "train") for event in counted), default=0)

    @property
    def best(self) -> dict[str, Any] | None:
        """The last evaluation that was a new best, so that its checkpoint was kept as the best."""
        evaluated = [event for event in self.of("valid") if event["loss"] is not None]
        bests = [event for event in evaluated if event.get("best")]
        return bests[-1] if bests else min(evaluated, key=lambda event: event["loss"], default=None)

    @property
    def test(self) -> dict[str, Any] | None:
        """The result on the test text, if it is that of the best model."""
        tests = self.of("test")
        is_current = tests and (self.best is None or self.best["step"] <= tests[-1]["step"])
        return tests[-1] if is_current else None

    @property
    def corpus(self) -> str:
        """What it is trained on: a corpus of the registry, or the user's files."""
        if self.checkpoints:
            return self.checkpoints[-1].corpus
        return " ".join(Path(name).name for name in self.config.data.data)

    @property
    def text(self) -> str | None:
        """A digest of its text and vocabulary; None without a checkpoint that has it."""
        return self.checkpoints[-1].text if self.checkpoints else None

    @functools.cached_property
    def vocab_size(self) -> int | None:
        """Words of the vocabulary; None without its file."""
        try:
            return self.folder.vocabulary.read_bytes().count(b"\n")
        except OSError:
            return None

    @property
    def num_parameters(self) -> int | None:
        """Of the model; None without a checkpoint that says it."""
        return self.checkpoints[-1].num_parameters if self.checkpoints else None

    @property
    def tokens_per_second(self) -> float | None:
        """The median over the log's intervals."""
        _, speeds = self.series("train", "tokens_per_second")
        return float(np.median(speeds)) if len(speeds) else None

    @property
    def training_seconds(self) -> float | None:
        """Time between evaluations, without the evaluations themselves."""
        _, seconds = self.series("valid", "seconds")
        return float(seconds.sum()) if len(seconds) else None

    def peak_memory(self, name: str = "peak_memory") -> int | None:
        """The most memory in bytes: ``peak_memory`` of the machine, ``device_memory`` of a GPU."""
        _, values = self.series("valid", name)
        return int(values.max()) if len(values) else None

    def summary(self) -> dict[str, Any]:
        """All of this in short, as plain JSON values."""
        best, test = self.best, self.test
        return {
            "path": str(self.folder.path),
            "state": self.state,
            "reason": self.reason,
            "model": self.config.model.summary,
            "corpus": self.corpus,
            "steps": self.steps,
            "epoch": self.epoch,
            "epochs": self.config.training.epochs,
            "best_step": None if best is None else best["step"],
            "best_perplexity": _perplexity(best),
            "test_perplexity": _perplexity(test),
            "tokens_per_second": self.tokens_per_second,
            "updated": self.updated,
        }


def _checked(event: dict[str, Any]) -> dict[str, Any]:
    """The event, if it is valid; `ValueError` otherwise."""
    numbers = {name: value for name, value in event.items() if name != "event"}
    for name, value in numbers.items():
        if not (value is None or (isinstance(value, (int, float)) and math.isfinite(value))):
            raise ValueError(f"{METRICS} step {event['step']}: {name} {value!r} is not a finite number")
    if event["event"] in ("valid", "test") and "loss" not in event:
        raise ValueError(f"{METRICS} step {event['step']}: {event['event']} has no loss")
    return event


def _perplexity(result: dict[str, Any] | None) -> float | None:
    """Of a validation or a test; None if there is none, or if it is infinite, which JSON cannot express."""
    return None if result is None or result["loss"] is None else finite_or_none(perplexity(result["loss"]))


def duration(seconds: float) -> str:
    """A length of time in two or three digits: ``45 s``, ``12 min``, ``3.5 h``, ``2.0 d``."""
    for unit, size, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 36 * 3600)):
        if seconds < limit:
            return f"{seconds / size:.1f} {unit}" if unit == "h" else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.1f} d"


def age(moment: float) -> str:
    """How long ago a moment was."""
    return duration(max(0.0, time.time() - moment))
