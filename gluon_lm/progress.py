"""Progress of long work, on standard error: a bar on a terminal, now and then a plain line elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_PLAIN_INTERVAL_S = 10.0
_BAR_DELAY_S = 0.5


class PlainProgress:
    """The part of tqdm's interface that this package uses, for output that is not a terminal.

    Work that is done within `interval_s` seconds leaves no line.
    """

    def __init__(self, total: float | None, desc: str | None, unit: str, interval_s: float = _PLAIN_INTERVAL_S) -> None:
        self.total, self.n = total, 0.0
        self._desc, self._unit, self._interval_s = desc, unit, interval_s
        self._next_line = time.monotonic() + interval_s

    def update(self, n: float = 1) -> None:
        """Note `n` more units of work."""
        self.n += n
        if self._desc is None or time.monotonic() < self._next_line:
            return
        self._next_line = time.monotonic() + self._interval_s
        done = f"{self.n:,.0f} {self._unit}"
        if self.total:
            done = f"{100 * self.n / self.total:.0f} % ({self.n:,.0f} of {self.total:,.0f} {self._unit})"
        print(f"{self._desc}: {done}", file=sys.stderr, flush=True)

    def reset(self, total: float | None = None) -> None:
        """Start again from nothing."""
        self.n = 0.0
        self.total = self.total if total is None else total

    def close(self) -> None:
        """Nothing to clear away."""

    def __enter__(self) -> PlainProgress:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def progress_bar(total: float | None = None, desc: str | None = None, unit: str = "it") -> tqdm | PlainProgress:
    """A progress bar to use in a ``with`` block and to ``update(n)``.

    Parameters
    ----------
    total : float, optional
        Units of work in all, where that is known.
    desc : str, optional
        What is being done. None: nothing is shown.
    unit : str
        Name of a unit of work.
    """
    if desc is None or not sys.stderr.isatty():
        return PlainProgress(total, desc, unit)
    from tqdm import tqdm

    scale = 1024 if unit == "B" else 1000
    return tqdm(
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
