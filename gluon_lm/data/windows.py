"""Truncated back-propagation through time: a token stream, cut into columns and then into windows.

Shapes: T time (rows of a window), N columns (streams read side by side).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Inputs and targets of one step.

    Attributes
    ----------
    tokens_TN, targets_TN : ndarray of int32
        ``targets_TN[t, n]`` is the word after ``tokens_TN[t, n]``.
    num_targets : int
        How many targets there are. Only the last row of a stream can be short: its columns from
        ``num_targets - (T - 1) * N`` on are padding.
    """

    tokens_TN: np.ndarray
    targets_TN: np.ndarray
    num_targets: int

    def columns(self, start: int, stop: int) -> Window:
        """The part of the window that one device takes."""
        rows, width = self.targets_TN.shape
        in_last_row = self.num_targets - (rows - 1) * width
        num_targets = (rows - 1) * (stop - start) + min(max(in_last_row - start, 0), stop - start)
        return Window(self.tokens_TN[:, start:stop], self.targets_TN[:, start:stop], num_targets)


class Streams:
    """A text as `num_streams` contiguous columns of equal length, give or take one token; nothing is dropped.

    Every token is the target of exactly one position. A column's first token is predicted from `eos`, for a text
    starts as if a line had just ended, and the other columns are cut from their true context in the same way.

    Parameters
    ----------
    ids : ndarray of int32, shape (num_tokens,)
    num_streams : int
        N, at least 1 and at most num_tokens.
    eos : int
        The id of ``<eos>``.
    """

    def __init__(self, ids: np.ndarray, num_streams: int, eos: int) -> None:
        self.num_tokens, self.num_streams = len(ids), num_streams
        self.num_rows = -(-len(ids) // num_streams)
        self._ids, self._eos = ids, eos
        full_rows, self._in_last_row = divmod(len(ids), num_streams)
        self._starts_N = np.arange(num_streams) * full_rows + np.minimum(np.arange(num_streams), self._in_last_row)

    def window(self, start: int, length: int) -> Window:
        """The window of rows ``start`` to ``start + length``, cut at the end of the streams."""
        stop = min(start + length, self.num_rows)
        positions_TN = self._starts_N + np.arange(start, stop)[:, None]
        num_targets = positions_TN.size
        if stop == self.num_rows and self._in_last_row:
            num_targets -= self.num_streams - self._in_last_row
        targets_TN = self._ids[np.minimum(positions_TN, self.num_tokens - 1)]
        tokens_TN = self._ids[np.maximum(positions_TN - 1, 0)]
        if start == 0:
            tokens_TN[0] = self._eos
        return Window(tokens_TN, targets_TN, num_targets)

    def windows(self, length: int) -> Iterator[Window]:
        """All windows of `length` rows in order; the last one may be shorter."""
        return (self.window(start, length) for start in range(0, self.num_rows, length))
