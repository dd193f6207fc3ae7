"""The curves of a report, independent of what draws them: what is shown of each run, smoothing, scales and ticks."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..history import RunHistory

_MOST_POINTS = 800  # of one curve: more than a screen shows
_SMOOTHED = 0.01  # standard deviation of the smoothing, as a share of the points
_FEWEST_SMOOTHED = 20
_MOST_LOG_TICKS = 7
_SHORTENED_FROM = 1e9
_LOG_FROM = 5.0  # a scale is logarithmic if the largest value is this many times the smallest

# Colours that can be distinguished, with a contrast of at least 4.5 to the page's background, and dashes that
# distinguish neighbours without colour.
COLOURS = ("#0b63b5", "#b93c0a", "#19794a", "#8a3ab9", "#8a5a00", "#0b6f8a", "#be185d", "#4b5563")
DARK_COLOURS = ("#79b8ff", "#ff9b71", "#6fd99b", "#d0a4ff", "#e6c14f", "#5fd3e8", "#ff9ecb", "#c3c9d2")
_DASHES: tuple[tuple[int, ...], ...] = ((), (7, 3), (2, 3), (9, 3, 2, 3))


def colour_of(run: int) -> int:
    """The index in `COLOURS` of a run's colour."""
    return run % len(COLOURS)


def dashes_of(run: int) -> tuple[int, ...]:
    """Lengths of a run's dashes and gaps, different ones once the colours repeat; none: a solid line."""
    return _DASHES[(run + run // len(COLOURS)) % len(_DASHES)]


@dataclass(frozen=True)
class Curve:
    """One run in one panel.

    Attributes
    ----------
    run : int
        Number of the run in the report.
    steps, values : ndarray of float64, shape (n,)
        As they were logged.
    smooth : ndarray of float64, shape (n,)
        What is drawn bold; the values themselves if they are few.
    """

    run: int
    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray

    @property
    def is_smoothed(self) -> bool:
        """Whether the bold line differs from what was logged."""
        return self.smooth is not self.values


@dataclass(frozen=True)
class Panel:
    """Curves of one quantity, of all runs that have it, over the steps.

    Attributes
    ----------
    key : str
        For file names.
    title : str
    form : str
        How a value is written: a format specification.
    best : str
        Which value of a curve is worth noting: ``lowest``, ``highest``, or nothing.
    curves : list of Curve
    is_log : bool
    """

    key: str
    title: str
    form: str
    best: str
    curves: list[Curve]
    is_log: bool

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest value on the scale; those of the bold line, as a spike must not flatten the rest."""
        bold = np.concatenate([curve.smooth for curve in self.curves])
        low, high = float(bold.min()), float(bold.max())
        if self.is_log:
            margin = math.exp(0.04 * (math.log(high) - math.log(low)))
            return low / margin or low, min(high * margin, sys.float_info.max)
        margin = 0.05 * (high - low) or abs(high) / 2 or 1.0
        return (low - margin if low < 0 else max(0.0, low - margin)), min(high + margin, sys.float_info.max)

    @property
    def last_step(self) -> float:
        """The right end of the scale."""
        return float(max(curve.steps[-1] for curve in self.curves)) or 1.0

    def height(self, values: np.ndarray) -> np.ndarray:
        """Where values are on the scale: 0 at the bottom, 1 at the top; values that are not smoothed may exceed it."""
        low, high = self.range
        if self.is_log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        return (values - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values to mark on the scale."""
        low, high = self.range
        return log_ticks(low, high) if self.is_log else linear_ticks(low, high)


_SAMPLED = "sampled-training-perplexity"  # over the words that a sampled softmax draws
# Key, title, event, number, format, value worth noting, whether it is smoothed. A perplexity is the exponential of the
# loss, so its scale is logarithmic.
_QUANTITIES = (
    ("validation-perplexity", "Validation perplexity", "valid", "perplexity", ",.2f", "lowest", False),
    ("training-perplexity", "Training perplexity", "train", "perplexity", ",.2f", "lowest", True),
    (_SAMPLED, "Training perplexity, over a sample of the words", "train", "perplexity", ",.2f", "lowest", True),
    ("learning-rate", "Learning rate", "train", "lr", ".4g", "", False),
    ("gradient-norm", "Gradient norm", "train", "grad_norm", ".3g", "highest", True),
    ("throughput", "Tokens per second", "train", "tokens_per_second", ",.0f", "", True),
    ("memory", "Peak memory in MB", "valid", "peak_memory", ",.0f", "highest", False),
    ("device-memory", "Memory in use on the GPU in MB", "valid", "device_memory", ",.0f", "highest", False),
)
_SCALES = {"peak_memory": 1e-6, "device_memory": 1e-6}


def panels_of(runs: Sequence[RunHistory]) -> list[Panel]:
    """The panels for which at least one run has data."""
    panels = []
    for key, title, event, name, form, best, is_smoothed in _QUANTITIES:
        curves = []
        for number, run in enumerate(runs):
            if (event, name) == ("train", "perplexity") and (key == _SAMPLED) != bool(run.config.model.num_sampled):
                continue
            steps, values = run.series(event, name)
            keep = np.isfinite(values) & (values > 0 if name in ("perplexity", "lr", "grad_norm") else values >= 0)
            steps, values = steps[keep], values[keep] * _SCALES.get(name, 1)
            if len(steps):
                wanted = is_smoothed and len(values) >= _FEWEST_SMOOTHED
                curves.append(Curve(number, steps, values, smoothed(values) if wanted else values))
        if curves:
            low, high = min(curve.smooth.min() for curve in curves), max(curve.smooth.max() for curve in curves)
            is_log = high > low > 0 and (name == "perplexity" or high >= _LOG_FROM * low)
            panels.append(Panel(key, title, form, best, curves, is_log))
    return panels


def smoothed(values: np.ndarray) -> np.ndarray:
    """A mean over neighbours, weighted by a Gaussian about 1 % of the points wide; symmetric, so without delay.

    If all values are positive, their logarithms are averaged: for a perplexity that is the mean loss.

    Parameters
    ----------
    values : ndarray of float64, shape (n,)

    Returns
    -------
    ndarray of float64, shape (n,)
    """
    sigma = max(1.0, _SMOOTHED * len(values))
    reach = min(int(3 * sigma) + 1, (len(values) - 1) // 2)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    positive = bool((values > 0).all())
    summed = np.convolve(np.log(values) if positive else values, bell, mode="same")
    mean = summed / np.convolve(np.ones(len(values)), bell, mode="same")
    return np.exp(mean) if positive else mean


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """No more points than can be seen: the first, the last, and the lowest and highest of each stretch."""
    if len(values) <= _MOST_POINTS:
        return steps, values
    edges = np.linspace(0, len(values), _MOST_POINTS // 2).astype(int)
    stretches = [(start, values[start:end]) for start, end in zip(edges, edges[1:])]
    extremes = [start + at for start, stretch in stretches for at in (stretch.argmin(), stretch.argmax())]
    kept = np.unique([0, *extremes, len(values) - 1])
    return steps[kept], values[kept]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """About `most` round numbers from `low` to `high`, evenly spaced."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough * (1 - 1e-9))
    first, last = math.ceil(low / size - 1e-9), math.floor(high / size + 1e-9)
    return [number * size for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """A few round numbers from `low` to `high`: as many multiples of each power of ten as there is room for."""
    if high < 4 * low:
        return linear_ticks(low, high, _MOST_LOG_TICKS)
    highest = min(math.ceil(math.log10(high)), sys.float_info.max_10_exp)
    powers = range(math.floor(math.log10(low)), highest + 1)
    every = 1
    while True:
        for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 3, 5, 7), (1, 2, 5), (1,)):
            ticks = [digit * 10.0**power for power in powers if power % every == 0 for digit in digits]
            ticks = [tick for tick in ticks if low <= tick <= high]
            if len(ticks) <= _MOST_LOG_TICKS:
                return ticks
        every += 1


def brief(value: float, form: str) -> str:
    """A value in a format, or in few digits if it is huge, like the perplexity of a model that diverges."""
    return f"{value:{'.3g' if value >= _SHORTENED_FROM else form}}"


def tick_label(value: float) -> str:
    """A tick in few characters: ``0.25``, ``1,500``, ``20k``, ``1e-05``, ``2e+12``."""
    if value >= _SHORTENED_FROM:
        return f"{value:.3g}"
    if value >= 10_000 and value % 100 == 0:
        return f"{value / 1_000_000:g}M" if value >= 1_000_000 else f"{value / 1000:g}k"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
