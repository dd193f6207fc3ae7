"""Progress of long work, on standard error: a bar on a terminal, otherwise a plain line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .heartbeat import beat
from .logs import has_bars, is_quiet, is_terminal, print_to_stderr
from .metrics import perplexity

if TYPE_CHECKING:
    from tqdm import tqdm

    from .training.step import StepResult

_PLAIN_INTERVAL_S = 10.0
_BAR_DELAY_S = 0.5
_REDRAW_S = 0.1
_MEMORY_S = 20.0  # time constant of the averages in a training bar

_Item = TypeVar("_Item")


class PlainProgress:
    """The part of tqdm's interface that this package uses, for output that is not a terminal.

    Work that is done within `interval_s` seconds leaves no line.
    """

    def __init__(self, total: float | None, desc: str | None, unit: str, interval_s: float = _PLAIN_INTERVAL_S) -> None:
        self.total, self.n = total, 0.0
        self._desc, self._interval_s = desc, interval_s
        self._units = unit if unit == "B" else f"{unit}s"
        self._next_line = time.monotonic() + interval_s

    def update(self, n: float = 1) -> None:
        """Note `n` more units of work."""
        beat()
        self.n += n
        if self._desc is None or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + self._interval_s
        done = f"{self.n:,.0f} {self._units}"
        if self.total:
            done = f"{100 * self.n / self.total:.0f} % ({self.n:,.0f} of {self.total:,.0f} {self._units})"
        print_to_stderr(f"{self._desc}: {done}")

    def reset(self) -> None:
        """Start again from zero."""
        self.n = 0.0

    def close(self) -> None:
        """Nothing to close."""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress_bar(total: float | None = None, desc: str | None = None, unit: str = "it") -> tqdm | PlainProgress:
    """A progress bar to use in a ``with`` block and to ``update(n)``; each is a heartbeat, shown or not.

    Parameters
    ----------
    total : float, optional
        Units of work in all, where that is known.
    desc : str, optional
        What is being done. None: nothing is shown, as in a quiet command.
    unit : str
        Name of a unit of work.
    """
    beat()
    if desc is None or is_quiet() or not is_terminal(sys.stderr):
        return PlainProgress(total, None if is_quiet() else desc, unit)
    from tqdm import tqdm

    class Bar(tqdm):
        def update(self, n=1):
            beat()
            return super().update(n)

    scale = 1024 if unit == "B" else 1000
    return Bar(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=True,
        unit_divisor=scale,
        delay=_BAR_DELAY_S,
        leave=False,
        dynamic_ncols=True,
        file=sys.stderr,
    )


def counted(items: Iterable[_Item], total: float | None, desc: str | None, unit: str) -> Iterator[_Item]:
    """Items as they come, each a unit of work in a `progress_bar`."""
    with progress_bar(total, desc, unit) as bar:
        for item in items:
            yield item
            bar.update(1)


class Place(NamedTuple):
    """The progress of an epoch.

    Attributes
    ----------
    epoch : int
        From 1.
    window, windows : int
        Steps done in the epoch, and in all of it.
    """

    epoch: int
    window: int
    windows: int


class TrainingBar:
    """The progress of a training run on a terminal: a bar for the epoch, and a line of figures below it.

    Elsewhere, or if the command is quiet, it shows nothing: the log has the same figures.

    Parameters
    ----------
    epochs : int
        Of the whole run.
    max_steps : int, optional
        Steps after which it ends, if that is earlier.
    """

    def __init__(self, epochs: int, max_steps: int | None = None) -> None:
        self._epochs, self._max_steps = epochs, max_steps
        self._bar: tqdm | None = None
        self._figures: tqdm | None = None
        if is_quiet() or not has_bars():
            return
        from tqdm import tqdm

        bar_format = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}"
        self._bar = tqdm(bar_format=bar_format, total=1, leave=False, dynamic_ncols=True, file=sys.stderr)
        self._figures = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True, file=sys.stderr)
        self._started_at: float | None = None  # in epochs
        self._started = 0.0
        self._next_drawing = 0.0
        self._losses = self._targets = self._seconds = self._steps = 0.0  # decaying sums: older steps count less

    def show(self, place: Place, step: int, lr: float, result: StepResult, seconds: float) -> None:
        """Show a step.

        Parameters
        ----------
        place : Place
        step : int
            Steps done in the run.
        lr : float
        result : StepResult
        seconds : float
            That the step took.
        """
        if self._bar is None or self._figures is None:
            return
        now = time.monotonic()
        keep = math.exp(-seconds / _MEMORY_S)
        self._losses = keep * self._losses + result.loss_sum
        self._targets = keep * self._targets + result.num_targets
        self._seconds, self._steps = keep * self._seconds + seconds, keep * self._steps + 1
        epoch, window, windows = place
        at = epoch - 1 + window / windows
        if self._started_at is None:
            self._started_at, self._started = at, now
        if now < self._next_drawing:
            return
        self._next_drawing = now + _REDRAW_S
        end: float = self._epochs
        if self._max_steps is not None:
            end = min(end, at + (self._max_steps - step) / windows)
        left = [f"{_clock(min(windows - window, (end - at) * windows) * self._seconds / self._steps)} left"]
        if end > epoch and at > self._started_at:
            left.append(f"{_clock((end - at) * (now - self._started) / (at - self._started_at))} to the end")
        mean = self._losses / self._targets
        self._bar.set_description_str(f"epoch {epoch:3d}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(", ".join(left), refresh=False)
        self._bar.total, self._bar.n = windows, window
        self._figures.set_description_str(
            f"loss {mean:5.2f} | ppl {perplexity(mean):8.2f} | lr {lr:g} | norm {result.grad_norm:.3f} | "
            f"{self._targets / self._seconds if self._seconds else 0:.0f} tokens/s",
            refresh=False,
        )
        self._bar.refresh()
        self._figures.refresh()

    def close(self) -> None:
        """Remove it from the terminal."""
        for bar in (self._figures, self._bar):
            if bar is not None:
                bar.close()
        self._bar = self._figures = None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
